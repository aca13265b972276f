"""A curation as its YAML says it: input, blocks in order, output. Every key is checked, and every block is made, before anything runs."""

import importlib
import inspect
import math
import os
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any

import yaml
from datatrove.pipeline.base import PipelineStep

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.names import nearest
from megatron_llama3.curation.global_block import GlobalBlock
from megatron_llama3.curation.storage.input import Input

# A block's name in the YAML -> its class, which takes the YAML's keys as keyword arguments. Imported when used.
BLOCKS = {
    "extract": "megatron_llama3.curation.blocks.extract:ExtractHtml",
    "language": "megatron_llama3.curation.blocks.language:LanguageFilter",
    "blocked_domains": "megatron_llama3.curation.blocks.privacy:DomainBlockFilter",
    "url_dedup": "megatron_llama3.curation.blocks.deduplicate:UrlDedup",
    "minhash_dedup": "megatron_llama3.curation.blocks.minhash:MinhashDedup",
    "line_dedup": "megatron_llama3.curation.blocks.deduplicate:LineDedup",
    "duplicate_ngrams": "megatron_llama3.curation.blocks.filters:DuplicateNgramFilter",
    "dirty_words": "megatron_llama3.curation.blocks.filters:DirtyWordFilter",
    "divergence": "megatron_llama3.curation.blocks.divergence:DivergenceFilter",
    "gopher_quality": "megatron_llama3.curation.blocks.filters:GopherQuality",
    "gopher_repetition": "megatron_llama3.curation.blocks.filters:GopherRepetition",
    "c4_quality": "megatron_llama3.curation.blocks.filters:C4Quality",
    "fineweb_quality": "megatron_llama3.curation.blocks.filters:FineWebQuality",
    "quality": "megatron_llama3.curation.blocks.quality:QualityFilter",
    "personal_data": "megatron_llama3.curation.blocks.privacy:RemovePersonalData",
    "personal_domains": "megatron_llama3.curation.blocks.privacy:PersonalDomains",
    "decontaminate": "megatron_llama3.curation.blocks.decontaminate:DecontaminationFilter",
    "domain": "megatron_llama3.curation.blocks.domains:DomainLabel",
    "mixture": "megatron_llama3.curation.blocks.mixture:Mixture",
}
_COMPRESSIONS = ("zstd", "none")
_GROUPS = ("input", "blocks", "output", "slurm", "ray")


@dataclass
class Pipeline:
    """What a YAML holds. blocks: (name, block) in order; slurm, ray: arguments of datatrove's executors."""

    input: Input
    blocks: list[tuple[str, PipelineStep | GlobalBlock]]
    compression: str = "zstd"
    slurm: dict[str, Any] = field(default_factory=dict)
    ray: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)  # the groups that decide the documents, as read
    files: list[list] = field(default_factory=list)  # [path, size, modification time] of the files that blocks read


def load_pipeline(path: str) -> Pipeline:
    """Raises UserError naming the file and the key."""
    document = _load(path)
    for group in document:
        if group not in _GROUPS:
            raise UserError(f"{path}: unknown group '{group}'{nearest(str(group), _GROUPS)}")
    for group in ("input", "blocks"):
        if not document.get(group):
            raise UserError(f"{path}: '{group}' is missing")
    if not isinstance(document["blocks"], list):
        raise UserError(f"{path}: blocks must be a list of '- name: {{arguments}}', not {document['blocks']!r}")
    groups = {group: _mapping(path, group, document.get(group)) for group in _GROUPS if group != "blocks"}
    return Pipeline(
        input=_input(path, groups["input"]),
        blocks=[_block(path, number, entry) for number, entry in enumerate(document["blocks"], 1)],
        compression=_compression(path, groups["output"]),
        slurm=groups["slurm"],
        ray=groups["ray"],
        work={group: document.get(group) for group in ("input", "blocks", "output")},
        files=_named_files(document["blocks"]),
    )


def _load(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            document = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: must hold the groups {', '.join(_GROUPS)}")
    return document


def _mapping(path: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"{path}: {name} must hold 'key: value' lines, not {value!r}")
    return value or {}


def _input(path: str, group: dict[str, Any]) -> Input:
    known = [entry.name for entry in fields(Input)]
    for key, value in group.items():
        if key not in known:
            raise UserError(f"{path}: unknown key input.{key}{nearest(str(key), known)}")
        if not isinstance(value, str) and not (key == "path" and isinstance(value, list)):
            raise UserError(f"{path}: input.{key} is {value!r}: expected text")
    if not group.get("path"):
        raise UserError(f"{path}: input.path is missing")
    paths = group["path"] if isinstance(group["path"], list) else [group["path"]]
    return Input(**{**group, "path": tuple(map(str, paths))})


def _compression(path: str, group: dict[str, Any]) -> str:
    for key in group:
        if key != "compression":
            raise UserError(f"{path}: unknown key output.{key}{nearest(str(key), ['compression'])}")
    compression = group.get("compression", "zstd")
    if compression not in _COMPRESSIONS:
        raise UserError(f"{path}: output.compression is {compression!r}: choose from {', '.join(_COMPRESSIONS)}")
    return compression


def _block(path: str, number: int, entry: Any) -> tuple[str, PipelineStep | GlobalBlock]:
    """An entry is `name` or `name: {arguments}`."""
    where = f"{path}: blocks[{number}]"
    name, arguments = (entry, {}) if isinstance(entry, str) else next(iter(entry.items())) if _is_single(entry) else (None, {})
    if name is None:
        raise UserError(f"{where} is {entry!r}: expected one 'name: {{arguments}}'")
    if name not in BLOCKS:
        raise UserError(f"{where}: unknown block '{name}'{nearest(str(name), BLOCKS) or '; there are ' + ', '.join(sorted(BLOCKS))}")
    where = f"{where}.{name}"
    arguments = _mapping(path, f"blocks[{number}].{name}", arguments)
    try:
        block_class = block_class_of(name)
        _check_arguments(where, block_class, arguments)
        return name, block_class(**arguments)
    except ImportError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}; the curation extra has what the blocks need") from None
    except OSError as error:
        raise UserError(f"{where}: {error.filename or ''}: {error.strerror or error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise error if str(error).startswith(path) else UserError(f"{where}: {error}") from None


def _named_files(value: Any) -> list[list]:
    """Models, lists and evaluation sets among the blocks' arguments: what a resumed run must find unchanged."""
    if isinstance(value, dict | list):
        return [file for part in (value.values() if isinstance(value, dict) else value) for file in _named_files(part)]
    if not isinstance(value, str) or not os.path.isfile(value):
        return []
    status = os.stat(value)
    return [[os.path.abspath(value), status.st_size, status.st_mtime_ns]]


def _is_single(entry: Any) -> bool:
    return isinstance(entry, dict) and len(entry) == 1


def block_class_of(name: str) -> type:
    module, _, class_name = BLOCKS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)


def block_parameters(block_class: type) -> dict[str, inspect.Parameter]:
    """What the YAML may give a block: its class's arguments, without a writer of what it drops and what is fixed here."""
    without = {"exclusion_writer", *getattr(block_class, "fixed_arguments", ())}
    return {name: parameter for name, parameter in inspect.signature(block_class).parameters.items() if name not in without}


def _check_arguments(where: str, block_class: type, arguments: dict[str, Any]) -> None:
    parameters = block_parameters(block_class)
    hints = typing.get_type_hints(block_class.__init__)
    for name, value in arguments.items():
        if name not in parameters:
            raise UserError(f"{where}: unknown argument '{name}'{nearest(str(name), parameters)}")
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{where}: {name} is {value!r}: expected {_spelt(hints[name])}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in arguments:
            raise UserError(f"{where}: argument '{name}' is missing")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value may stand for an argument of that type; types that YAML cannot tell apart pass."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    kind, parts = origin or hint, typing.get_args(hint)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is tuple and len(parts) > 1 and Ellipsis not in parts:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if kind in (list, tuple, set):
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value if parts)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(item, part) for pair in value.items() for item, part in zip(pair, parts))
    return isinstance(value, kind) if kind in (str, bool, type(None)) else True


def _spelt(hint: Any) -> str:
    return str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
