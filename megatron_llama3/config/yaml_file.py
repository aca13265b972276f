"""A run's config as YAML, nested by group: reading it with every key and type checked, and writing the resolved config."""

import contextlib
import dataclasses
import reprlib
from typing import Any

import yaml

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.fields import FieldSpec, field_specs, groups
from megatron_llama3.config.names import nearest


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML's own rule would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str, config_class: type) -> tuple[str | None, dict[tuple[str, str], Any]]:
    """(model name or None, {(group, field): value}) of a config file. Raises UserError naming the file and the key."""
    document = _load(path)
    model_name = document.pop("model_name", None)
    specs = {(spec.group, spec.name): spec for spec in field_specs(config_class)}
    known_groups = list(groups(config_class))
    values = {}
    for group, fields in document.items():
        if group not in known_groups:
            raise UserError(f"{path}: unknown group '{group}'{nearest(str(group), [*known_groups, 'model_name'])}")
        if not isinstance(fields, dict | None):
            raise UserError(f"{path}: {group} must hold 'key: value' lines, not {fields!r}")
        for name, value in (fields or {}).items():
            if (group, name) not in specs:
                inside = [n for g, n in specs if g == group]
                elsewhere = [f"{g}.{n}" for g, n in specs if n == name]
                hint = f"; did you mean {elsewhere[0]}?" if elsewhere else nearest(str(name), inside)
                raise UserError(f"{path}: unknown key {group}.{name}{hint}")
            values[group, name] = _checked(path, specs[group, name], value)
    return model_name, values


def _load(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            document = yaml.load(file, Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes that are no UTF-8, a number of 5,000 digits
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict | None):
        raise UserError(f"--config {path}: must hold groups such as 'model:', not {document!r}")
    return document or {}


def _checked(path: str, spec: FieldSpec, value: Any) -> Any:
    where = f"{path}: {spec.group}.{spec.name}"
    if value is None and spec.optional:
        return None
    if spec.is_list:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}: expected a list")
        if spec.type is not str and any(type(item) is not spec.type for item in value):
            raise UserError(f"{where} is {value!r}: expected a list of {spec.type.__name__}")
        return [spec.type(item) for item in value]
    if spec.type is float and isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 reads 3e-4 as text
    if type(value) is not spec.type:
        raise UserError(f"{where} is {reprlib.repr(value)}: expected {spec.type.__name__}")
    if spec.choices and value not in spec.choices:
        raise UserError(f"{where} is {value!r}: choose from {', '.join(spec.choices)}")
    return value


def resolved_yaml(config: Any) -> str:
    """Every field of every group as YAML; `load_run_config` reads it back to an equal config."""
    tree = {group: dataclasses.asdict(getattr(config, group)) for group in groups(type(config))}
    return yaml.safe_dump(tree, sort_keys=False, width=1000)
