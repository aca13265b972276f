"""Flags and YAML to a RunConfig. The dataclasses are the one source: each field is a flag, under Megatron-LM's name if it has one.

Later ones win: dataclass defaults, `--model-name`, `--config FILE.yaml`, flags. `--no-X` sets the boolean X back to false
(`--X`, where the field itself is named `no_x`).
"""

import argparse
import os
from typing import Any, TypeVar

from megatron_llama3.config import validate
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.fields import FieldSpec, field_specs, groups
from megatron_llama3.config.megatron_flags import explain_all, fixed_flags, flags_without_effect, notices
from megatron_llama3.config.presets import PRESETS
from megatron_llama3.config.run import RunConfig

Config = TypeVar("Config", bound=RunConfig)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message.removeprefix("argument "))


def build_parser(config_class: type[RunConfig] = RunConfig) -> argparse.ArgumentParser:
    """The parser of every field of `config_class`; nothing is set unless given."""
    usage = "%(prog)s [--config FILE.yaml] [--model-name NAME] [flags]"
    parser = _Parser(usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=_OneLineHelp)
    run = parser.add_argument_group("run")
    run.add_argument("--config", metavar="FILE.yaml", help="Config file, nested by group; flags override it.")
    run.add_argument("--model-name", choices=list(PRESETS), help="A named model size: sets every field of the model group.")
    run.add_argument("--dry-run", action="store_true", help="Check the layout, print what follows from it, and exit; no GPU needed.")
    sections = {group: parser.add_argument_group(group) for group in groups(config_class)}
    for spec in field_specs(config_class):
        _add_field(sections[spec.group], spec)
    fixed = parser.add_argument_group("Megatron-LM's flags that Llama 3 fixes: accepted with this value only")
    for flag, kwargs in fixed_flags().items():
        fixed.add_argument(flag, dest="_fixed", **kwargs)
    ignored = parser.add_argument_group("Megatron-LM's flags without effect here: accepted with a notice")
    for flag, kwargs in flags_without_effect().items():
        ignored.add_argument(flag, dest=f"_ignored {flag}", **kwargs)
    return parser


class _OneLineHelp(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=60, width=160)


def _add_field(section: argparse._ArgumentGroup, spec: FieldSpec) -> None:
    dest = f"{spec.group}.{spec.name}"
    default = "" if spec.default in (None, [], False) else f" (default {str(spec.default).lower() if spec.type is bool else spec.default})"
    help_text = (spec.help + default).replace("%", "%%")
    if spec.type is bool:
        section.add_argument(spec.flag, *spec.aliases, dest=dest, action="store_true", help=help_text)
        section.add_argument(spec.negative_flag, dest=dest, action="store_false", help=argparse.SUPPRESS)
        return
    metavar = None if spec.choices else {int: "N", float: "X", str: "TEXT"}[spec.type]
    section.add_argument(
        spec.flag,
        *spec.aliases,
        dest=dest,
        type=spec.type,
        nargs=spec.nargs,
        choices=spec.choices or None,
        metavar=metavar,
        help=help_text,
    )


def parse_run_config(argv: list[str], config_class: type[Config] = RunConfig) -> Config:
    """The validated config of a command line. Raises UserError with one line for each thing that is wrong."""
    parser = build_parser(config_class)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(explain_all(unknown, sorted(parser._option_string_actions)))
    given = vars(namespace)
    given.pop("_fixed", None)
    ignored = [name for name in given if name.startswith("_ignored ")]
    for name in ignored:
        del given[name]
    model_name, values = given.pop("model_name", None), {}
    dry_run = given.pop("dry_run", False)
    if "config" in given:
        from megatron_llama3.config.yaml_file import read_yaml  # 40 ms that a run without a file need not wait for

        named_in_file, values = read_yaml(given.pop("config"), config_class)
        model_name = model_name or named_in_file
    values |= {tuple(dest.split(".")): value for dest, value in given.items()}
    _take_world_size(values, given, dry_run)
    config = _build(config_class, model_name, values)
    config.dry_run = dry_run
    config.notices = notices([name.removeprefix("_ignored ") for name in ignored])
    validate.resolve(config, given_seq_length=("data", "seq_length") in values)
    validate.validate(config)
    return config


def _take_world_size(values: dict, given: dict[str, Any], dry_run: bool) -> None:
    """The launcher's WORLD_SIZE is the fact; only a dry run may imagine another."""
    environment = os.environ.get("WORLD_SIZE", "")
    if environment and not environment.isdecimal():
        raise UserError(f"WORLD_SIZE={environment} in the environment: the launcher sets it to the number of ranks; unset it")
    started, flag = int(environment or 1), given.get("parallel.world_size")
    if flag is not None and not dry_run and flag != started:
        raise UserError(f"--world-size {flag}, but {started} rank(s) were started: leave it out, or add --dry-run")
    if flag is None and environment:
        values["parallel", "world_size"] = started
    elif flag is None and not dry_run:
        values.pop(("parallel", "world_size"), None)


def _build(config_class: type[Config], model_name: str | None, values: dict[tuple[str, str], Any]) -> Config:
    from_preset = {} if model_name is None else _preset_fields(model_name)
    merged = {("model", name): value for name, value in from_preset.items()} | values
    parts = {group: cls(**{n: v for (g, n), v in merged.items() if g == group}) for group, cls in groups(config_class).items()}
    return config_class(**parts)


def _preset_fields(model_name: str) -> dict[str, Any]:
    if str(model_name) not in PRESETS:
        raise UserError(f"model_name {model_name}: no such model; there are {', '.join(PRESETS)}")
    return PRESETS[model_name]


def load_run_config(path: str, config_class: type[Config] = RunConfig) -> Config:
    """The config that `resolved_yaml` wrote, as it was: nothing is taken from flags or the environment. Raises UserError."""
    from megatron_llama3.config.yaml_file import read_yaml

    model_name, values = read_yaml(path, config_class)
    return _build(config_class, model_name, values)


def resolved_yaml(config: RunConfig) -> str:
    """Every field of every group as YAML; `load_run_config` reads it back to an equal config."""
    from megatron_llama3.config import yaml_file

    return yaml_file.resolved_yaml(config)
