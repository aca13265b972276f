"""A setting that nothing reads is a promise that nothing keeps: every field is read outside the code that parses and checks it.

Read means read off its own section: `split` of a string or `load` of numpy is no field of ours. An expression is a section where it is an
attribute of that name (`config.training`), a parameter of its class, `self` in that class, or a name that such an expression is given.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import megatron_llama3
from megatron_llama3.config.run import RunConfig

PACKAGE = Path(megatron_llama3.__file__).parent
PARSING = {"validate.py", "command_line.py", "fields.py", "yaml_file.py", "megatron_flags.py"}
SECTIONS = {f.name: f.default_factory for f in fields(RunConfig) if hasattr(f.default_factory, "__dataclass_fields__")}
BY_CLASS = {section.__name__: name for name, section in SECTIONS.items()}


def fields_read(program: ast.Module) -> set[tuple[str, str]]:
    """(section, attribute) of all that is read off an expression that is a section."""
    names: dict[str, set[str]] = defaultdict(set, {"model.config": {"model"}})  # what a Llama was built from

    def sections(node: ast.expr) -> set[str]:
        by_attribute = {node.attr} & set(SECTIONS) if isinstance(node, ast.Attribute) else set()
        return names[ast.unparse(node)] | by_attribute

    for node in ast.walk(program):
        if isinstance(node, ast.arg) and node.annotation is not None:
            names[node.arg] |= {section for name, section in BY_CLASS.items() if ast.unparse(node.annotation).startswith(name)}
        elif isinstance(node, ast.ClassDef) and node.name in BY_CLASS:
            names["self"].add(BY_CLASS[node.name])
    for _ in range(2):  # a name may be given on
        for node in ast.walk(program):
            if isinstance(node, ast.Assign):
                for target, value in pairs(node.targets[0], node.value):
                    names[ast.unparse(target)] |= sections(value)
    reads = (n for n in ast.walk(program) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))
    return {(section, node.attr) for node in reads for section in sections(node.value)}


def pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        yield from zip(target.elts, value.elts)
    else:
        yield target, value


def test_only_what_is_read_off_a_section_counts():
    program = """
def f(config: TrainingConfig, c):
    o, (a, b) = c.optimizer, text.split()
    p = q = c.checkpoint
    return config.seed, o.lr, np.load(x), p.save, c.data.seq_length, generator.seed
"""
    found = fields_read(ast.parse(program))
    assert found == {("training", "seed"), ("optimizer", "lr"), ("checkpoint", "save"), ("data", "seq_length")}


def test_every_field_is_read():
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "config" or path.name not in PARSING:
            read |= fields_read(ast.parse(path.read_text(encoding="utf-8")))
    # It is turned into num_virtual_stages_per_pipeline_rank on the way in.
    resolved_away = {("parallel", "num_layers_per_virtual_pipeline_stage")}
    unread = {(name, field.name) for name, section in SECTIONS.items() for field in fields(section)} - read - resolved_away
    assert not unread
