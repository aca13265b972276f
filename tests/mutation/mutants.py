"""What a mutant is: one small fault in one line of a source file, such as a swapped operator, a dropped statement or a lost argument.

`mutants_of` lists all that the operators below make of a file, `sample` draws some line by line. A mutant replaces the text of one node of
the syntax tree; strings, annotations, decorators and the defaults of arguments stay as they are.
"""

import ast
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import unified_diff

SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
PAIRS = {"min": "max", "max": "min", "any": "all", "all": "any", "zeros_like": "ones_like", "SUM": "MAX", "MAX": "SUM"}
OPPOSITE = PAIRS | {"continue": "break", "break": "continue"}
SAME_KIND = {
    *("to", "float", "double", "contiguous", "clone", "detach", "exp", "exp_", "log", "abs", "sqrt", "square", "clamp_min", "masked_fill"),
    *("mul", "mul_", "div", "div_", "sub_", "add_", "flatten", "view", "unsqueeze", "requires_grad_", "strip"),
}
"""Methods whose result is much like their object: without the call the program goes on with a wrong value, where others would raise."""
SYMMETRIC = {"min", "max", "transpose", "promote_types"}
"""Functions of two arguments that may change places."""
LEFT_OUT = (ast.JoinedStr, ast.arguments)  # positions inside f-strings are wrong before Python 3.12


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    operator: str
    start: int
    """where the replaced text starts in the file, in characters, and where it ends"""
    end: int
    text: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def statement_lines(self, source: str) -> range:
        """Lines of the innermost statement around it, of a compound one the head alone: where a traceback may place it."""
        around = [
            node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt) and node.lineno <= self.line <= node.end_lineno
        ]
        innermost = min(around, key=lambda node: node.end_lineno - node.lineno)
        body = getattr(innermost, "body", None)
        return range(innermost.lineno, body[0].lineno if body else innermost.end_lineno + 1)

    def diff(self, source: str) -> str:
        lines = unified_diff(source.splitlines(), self.apply(source).splitlines(), self.path, self.path, lineterm="", n=0)
        return "\n".join(list(lines)[2:])


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All mutants of a file that still compile, by line."""
    starts = _line_starts(source)
    tree = ast.parse(source)
    found = []
    for node in _nodes(tree):
        for replaced, operator, text in _replacements(node):
            mutant = Mutant(path, replaced.lineno, operator, *_span(replaced, source, starts), text)
            if _compiles(mutant.apply(source)):
                found.append(mutant)
    return sorted(found, key=lambda mutant: (mutant.line, mutant.start, mutant.operator, mutant.text))


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Lines drawn without return, then one mutant of each: a line with many operators counts no more than another."""
    lines: dict[tuple[str, int], list[Mutant]] = {}
    for mutant in mutants:
        lines.setdefault((mutant.path, mutant.line), []).append(mutant)
    generator = random.Random(seed)
    drawn = generator.sample(sorted(lines), min(count, len(lines)))
    return [generator.choice(lines[line]) for line in drawn]


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, LEFT_OUT):
                yield child
                yield from _nodes(child)


def _replacements(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """(replaced node, operator's name, text in its place)"""
    for condition in _conditions(node):
        yield condition, "condition negated", f"(not ({ast.unparse(condition)}))"
    if isinstance(node, ast.stmt):
        yield from ((node, *found) for found in _of_statement(node))
    elif isinstance(node, ast.Constant):
        yield from ((node, "constant", text) for text in _other_constants(node.value))
    elif isinstance(node, ast.expr):
        yield from ((node, operator, f"({ast.unparse(other)})") for operator, other in _of_expression(node))


def _conditions(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return [node.test]
    return node.ifs if isinstance(node, ast.comprehension) else []


def _of_statement(node: ast.stmt) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.AugAssign):
        if type(node.op) in SWAPPED:
            yield "operator", ast.unparse(_with(node, op=SWAPPED[type(node.op)]()))
        yield "statement dropped", "pass"
    elif isinstance(node, (ast.Continue, ast.Break)):
        yield "loop", OPPOSITE[type(node).__name__.lower()]
    elif _can_be_dropped(node):
        yield "statement dropped", "pass"


def _can_be_dropped(node: ast.stmt) -> bool:
    """Without a name that is missing afterwards."""
    if isinstance(node, ast.Assign):
        return not any(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets)
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, (ast.Raise, ast.Delete, ast.Assert, ast.Expr)) and not is_docstring


def _of_expression(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPPED:
        yield "operator", _with(node, op=SWAPPED[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield "comparison", _with(node, ops=[SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp):
        yield "operator dropped", node.operand
    elif isinstance(node, ast.Name) and node.id in PAIRS and isinstance(node.ctx, ast.Load):
        yield "name", ast.Name(PAIRS[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in PAIRS and isinstance(node.ctx, ast.Load):
        yield "name", _with(node, attr=PAIRS[node.attr])
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    if len(node.args) > 1 and name not in SYMMETRIC and not any(isinstance(argument, ast.Starred) for argument in node.args[:2]):
        yield "arguments swapped", _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for place, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield "argument lost", _with(node, keywords=node.keywords[:place] + node.keywords[place + 1 :])
    if isinstance(node.func, ast.Attribute) and node.func.attr in SAME_KIND:
        yield "call dropped", node.func.value


def _other_constants(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    return [repr(value + 1), repr(value - 1)] if isinstance(value, (int, float)) else []


def _with(node: ast.AST, **fields):
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _line_starts(source: str) -> list[int]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _span(node: ast.expr | ast.stmt, source: str, starts: list[int]) -> tuple[int, int]:
    """Characters, where the syntax tree counts bytes of a line."""

    def place(line: int, byte: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:byte].decode())

    return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
