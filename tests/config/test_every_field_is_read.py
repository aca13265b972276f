"""A setting that nothing reads is a promise that nothing keeps: every field is read outside the code that parses and checks it."""

import ast
from pathlib import Path

import megatron_llama3
from megatron_llama3.config.fields import field_specs
from megatron_llama3.config.run import RunConfig

PACKAGE = Path(megatron_llama3.__file__).parent
PARSING = {"validate.py", "command_line.py", "fields.py", "yaml_file.py", "megatron_flags.py"}


def attributes_read() -> set[str]:
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "config" and path.name in PARSING:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def test_every_field_is_read():
    # num_layers_per_virtual_pipeline_stage is turned into num_virtual_stages_per_pipeline_rank on the way in.
    resolved_away = {"num_layers_per_virtual_pipeline_stage"}
    unread = {spec.name for spec in field_specs(RunConfig)} - attributes_read() - resolved_away
    assert not unread
