"""Reading tool calls out of what the assistant writes, all at once or as it comes: the forms of Llama 3.1, 3.2 and 3.3.

    <function=f>{"a": 1}</function>             {"name": "f", "parameters": {"a": 1}}; {"name": "g", "arguments": {}}
    [f(a=1), g.h(b=[true, "x"])]                brave_search.call(query="...")     (built-in tools, and at the start alone)

JSON calls may stand one after another, between `;` or `,`, or in a list. Whatever is no call of an allowed tool stays text, to the letter.
"""

import ast
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

QUERY_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
_OPENING = re.compile(r"[<\[{]")
_TAG = re.compile(r"<function=([\w.-]+)>\s*(?=\{)")
_TAG_BEGINS = re.compile(r"<(f(u(n(c(t(i(o(n(=([\w.-]+(>\s*)?)?)?)?)?)?)?)?)?)?)?")
_OBJECT = re.compile(r'\{\s*"(type|name|parameters|arguments)"\s*:')
_OBJECT_BEGINS = re.compile(r'\{\s*("(\w*("\s*)?)?)?')
_LIST_OF_CALLS = re.compile(r"\[\s*([A-Za-z_][\w.]*)\s*\(")
_LIST_BEGINS = re.compile(r"\[\s*([A-Za-z_][\w.]*\s*)?")
_BETWEEN = re.compile(r"[\s;,]*")
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_JSON_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}"]', re.DOTALL)
_PYTHON_PARTS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[()\[\]{}"']""", re.DOTALL)
_DEPTH = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_LITERALS = {"true": True, "false": False, "null": None}
_MOST_SCANNED = 2_000_000
"""characters in which the ends of possible calls are looked for, one message: each may have to be read to the message's end"""


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant makes. Built-in tools take {"query": ...}, the code interpreter {"code": ...}."""

    name: str
    arguments: dict[str, Any]


class _Incomplete(Exception):
    """What stands there may become a call when more text comes."""


class ToolCallReader:
    """Takes the text in pieces, however it is cut, and tells calls from text.

    tools: names that may be called; None allows any name, and then a JSON object needs its parameters to be a call.
    """

    def __init__(self, tools: Collection[str] | None = None):
        self.tools = tools
        self._text, self._is_last = "", False  # what is not told yet
        self._at_start, self._after_call = True, False
        self._scanned = 0

    def feed(self, text: str, is_last: bool = False) -> tuple[str, list[ToolCall]]:
        """(text that is surely no call, calls that are complete), in the order in which they end. `is_last`: nothing follows."""
        self._text, self._is_last = self._text + text, is_last
        free, calls, at = [], [], 0
        while at < len(self._text):
            try:
                found, end = self._next(at)
            except _Incomplete:
                break
            if found is None:
                free.append(self._text[at:end])
            else:
                calls += found
            self._after_call = found is not None
            self._at_start = self._at_start and found is None and not free[-1].strip()
            at = end
        self._text = self._text[at:]
        return "".join(free), calls

    def _next(self, at: int) -> tuple[list[ToolCall] | None, int]:
        """(the calls at `at`, or None for text, where they end). Raises _Incomplete if that cannot be told yet."""
        skipped = _BETWEEN if self._after_call else _SPACE
        start = skipped.match(self._text, at).end() if self._after_call or self._at_start else at
        if start == len(self._text):
            self._wait()
            return None, start
        found = self._calls_at(start)
        if found is not None:
            return found
        following = _OPENING.search(self._text, start + 1)
        return None, following.start() if following else len(self._text)

    def _calls_at(self, start: int) -> tuple[list[ToolCall], int] | None:
        """(calls, end), or None. Raises _Incomplete."""
        readers = {"<": [self._tag], "{": [self._object], "[": [self._list_of_objects, self._list_of_calls]}
        builtin = [self._builtin] if self._at_start else []
        try:
            for read in readers.get(self._text[start], builtin):
                found = read(start)
                if found is not None:
                    return found
        except _Incomplete:
            self._wait()
        return None

    def _wait(self) -> None:
        if not self._is_last:
            raise _Incomplete

    def _tag(self, start: int) -> tuple[list[ToolCall], int] | None:
        opened = _TAG.match(self._text, start)
        if opened is None:
            return self._wait_for(_TAG_BEGINS, start)
        arguments, end = self._json(opened.end())
        if not isinstance(arguments, dict) or not self._may_call(opened[1], True):
            return None
        rest = self._text[end : end + 100].lstrip()
        if rest.startswith("</function>"):
            end = self._text.index("</function>", end) + len("</function>")
        elif "</function>".startswith(rest):
            self._wait()
        return [ToolCall(opened[1], arguments)], end

    def _object(self, start: int) -> tuple[list[ToolCall], int] | None:
        if _OBJECT.match(self._text, start) is None:
            return self._wait_for(_OBJECT_BEGINS, start)
        content, end = self._json(start)
        call = self._as_call(content)
        return None if call is None else ([call], end)

    def _list_of_objects(self, start: int) -> tuple[list[ToolCall], int] | None:
        first = _SPACE.match(self._text, start + 1).end()
        if first == len(self._text):
            raise _Incomplete
        if _OBJECT.match(self._text, first) is None:
            return self._wait_for(_OBJECT_BEGINS, first)
        content, end = self._json(start)
        calls = [self._as_call(entry) for entry in content] if isinstance(content, list) else []
        return (calls, end) if calls and None not in calls else None

    def _list_of_calls(self, start: int) -> tuple[list[ToolCall], int] | None:
        opened = _LIST_OF_CALLS.match(self._text, start)
        if opened is None:
            begun = _LIST_BEGINS.fullmatch(self._text, start)
            if begun and self._may_begin((begun[1] or "").strip()):
                raise _Incomplete
            return None
        if not self._may_call(opened[1], True):
            return None
        parsed, end = self._python(start, start)
        calls = [_plain_call(node) for node in parsed.elts] if isinstance(parsed, ast.List) else []
        if None in calls or not all(self._may_call(call.name, True) for call in calls):
            return None
        return (calls, end) if calls else None

    def _builtin(self, start: int) -> tuple[list[ToolCall], int] | None:
        for name in QUERY_TOOLS:
            if self._may_call(name, True) and self._text.startswith(f"{name}.call(", start):
                parsed, end = self._python(start, start + len(f"{name}.call"))
                call = _plain_call(parsed)
                return None if call is None else ([ToolCall(name, call.arguments)], end)
            if self._may_call(name, True) and f"{name}.call(".startswith(self._text[start : start + 100]):
                raise _Incomplete
        return None

    def _as_call(self, content: Any) -> ToolCall | None:
        """The call that a JSON value is, or None."""
        if not isinstance(content, dict) or not content.keys() <= {"type", "name", "parameters", "arguments", "id"}:
            return None
        arguments = content.get("parameters", content.get("arguments"))
        if isinstance(arguments, str):  # as OpenAI's API spells them
            arguments = _parsed_json(arguments)
            if arguments is None:
                return None
        has_arguments = "parameters" in content or "arguments" in content
        name, arguments = content.get("name"), {} if arguments is None else arguments
        if not isinstance(name, str) or not isinstance(arguments, dict) or not self._may_call(name, has_arguments):
            return None
        return ToolCall(name, arguments)

    def _may_call(self, name: str, has_arguments: bool) -> bool:
        return has_arguments if self.tools is None else name in self.tools

    def _may_begin(self, name: str) -> bool:
        return self.tools is None or any(tool.startswith(name) for tool in self.tools)

    def _wait_for(self, beginning: re.Pattern, start: int) -> None:
        """None if no call can begin at `start`. Raises _Incomplete if all that is there is the beginning of one."""
        if beginning.fullmatch(self._text, start):
            raise _Incomplete

    def _json(self, start: int) -> tuple[Any, int]:
        """(the JSON value at `start` or None, its end). Raises _Incomplete if the text ends inside it."""
        end = self._end(_JSON_PARTS, start)
        return _parsed_json(self._text[start:end]), end

    def _python(self, start: int, bracket: int) -> tuple[ast.expr | None, int]:
        """(the expression that begins at `start`, or None, the end of its `bracket`). Raises _Incomplete if the text ends inside it."""
        end = self._end(_PYTHON_PARTS, bracket)
        try:
            return ast.parse(self._text[start:end], mode="eval").body, end
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return None, end

    def _end(self, parts: re.Pattern, start: int) -> int:
        """Behind the bracket that closes the one at `start`; `start` after too many of them. Raises _Incomplete if none does."""
        if self._scanned > _MOST_SCANNED:
            return start
        depth = 0
        for part in parts.finditer(self._text, start):
            depth += _DEPTH.get(part[0], 0)
            if depth == 0:
                self._scanned += part.end() - start
                return part.end()
            if part[0] in "\"'":  # a string without an end
                break
        self._scanned += self._is_last * (len(self._text) - start)
        raise _Incomplete


def read_tool_calls(text: str, tools: Collection[str] | None = None) -> tuple[str, list[ToolCall]]:
    """(the text that remains, all calls in order)"""
    return ToolCallReader(tools).feed(text, is_last=True)


def _parsed_json(text: str) -> Any:
    """The value of a text that is JSON to its end and says nothing twice, or None."""
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if end == len(text) else None


def _refuse(value: object) -> None:
    raise ValueError(value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_without_repeats)


def _plain_call(node: ast.expr | None) -> ToolCall | None:
    """f(a=1, ...) or g.h(...) with constants only, or None."""
    if not isinstance(node, ast.Call) or node.args or not all(keyword.arg for keyword in node.keywords):
        return None
    try:
        name = ast.unparse(node.func)
        arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    except (ValueError, TypeError, RecursionError):
        return None
    return ToolCall(name, arguments) if _NAME.fullmatch(name) and len(arguments) == len(node.keywords) else None


def _value(node: ast.expr) -> Any:
    """What a constant of Python or of JSON says. Raises ValueError for anything else, infinite numbers too."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.Name) and node.id in _LITERALS:
        return _LITERALS[node.id]
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(value)
    return value


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a key that is no string")
