"""How a config field carries its own documentation: the parser, the YAML reader and `--help` all read it from here."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    zero_ok: bool = False,
    needs: str | None = None,
) -> Any:
    """A dataclass field with its help text, the values it admits, and other spellings of its flag. Numbers are above 0 unless `zero_ok`;
    without the field `needs` of the same group it has no effect."""
    metadata = {"help": help, "choices": choices, "aliases": aliases, "zero_ok": zero_ok, "needs": needs}
    return dataclasses.field(default=default, metadata=metadata)


def list_option(help: str, *, default: tuple = (), nargs: str = "*", needs: str | None = None) -> dict[str, Any]:
    """Keyword arguments of `dataclasses.field` for a list; `nargs` is argparse's."""
    return {"default_factory": lambda: list(default), "metadata": {"help": help, "nargs": nargs, "needs": needs}}


@dataclass(frozen=True)
class FieldSpec:
    """One field of one group, as the parser sees it."""

    group: str
    name: str
    type: type
    optional: bool
    is_list: bool
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    zero_ok: bool = False
    needs: str | None = None
    nargs: str | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def negative_flag(self) -> str:
        """The flag that sets a boolean to false: `--no-bf16`, and `--load-optim` for a field that is itself named `no_...`."""
        return "--" + self.name[3:].replace("_", "-") if self.name.startswith("no_") else "--no-" + self.name.replace("_", "-")


def _plain_type(hint: Any) -> tuple[type, bool, bool]:
    """(element type, may be None, is a list) of a type hint such as `int | None` or `list[str]`."""
    if isinstance(hint, types.UnionType):
        (inner,) = [a for a in typing.get_args(hint) if a is not type(None)]
        return _plain_type(inner)[0], True, _plain_type(inner)[2]
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], False, True
    return hint, False, False


def groups(config_class: type) -> dict[str, type]:
    """Group name -> dataclass, for a config that is a dataclass of dataclasses."""
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(hints[f.name])}


@cache
def field_specs(config_class: type) -> list[FieldSpec]:
    """Every field of every group, in order of declaration."""
    specs = []
    for group, group_class in groups(config_class).items():
        hints = typing.get_type_hints(group_class)
        for f in dataclasses.fields(group_class):
            plain, optional, is_list = _plain_type(hints[f.name])
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            specs.append(FieldSpec(group, f.name, plain, optional, is_list, default, **f.metadata))
    return specs
