"""Megatron-LM's distributed checkpoints written tensor by tensor, as megatron-core loads them into any layout."""

import io
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_llama3.checkpoint.files.file_writer import FileWriter
from megatron_llama3.checkpoint.files.publish import write_in_parallel
from megatron_llama3.checkpoint.files.torch_archive_writer import write_archive
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, WeightSource, cast, concatenate, with_leading
from megatron_llama3.checkpoint.megatron.config import arguments_for_megatron, optimizer_groups, scheduler_state
from megatron_llama3.checkpoint.megatron.names import OUTER, fuse_layer
from megatron_llama3.checkpoint.megatron.reader import COMMON_FILE, FORMAT_FILE, GENERATION_FILE, STATE
from megatron_llama3.checkpoint.native.folder import LATEST_FILE
from megatron_llama3.checkpoint.native.metadata import METADATA_FILE
from megatron_llama3.checkpoint.tokenizer_files import write_tokenizer
from megatron_llama3.config.model import ModelConfig

_FORMAT = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}'
_VOCABULARY_MULTIPLE = 128  # Megatron-LM's --make-vocab-size-divisible-by
_FILES = 4
# Modules that keep a state of their own beside weights: Megatron-LM asks for an entry of each, and Transformer Engine for more.
_LOCAL_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
_TE_STATES = ("self_attention.core_attention",)
_TE_OUTER_STATES = ("decoder.final_layernorm",)


@dataclass(frozen=True)
class _Chunk:
    """One part of a stored tensor: `key` [shape], this part from `offsets` on. Without a tensor it is an empty state of a module."""

    key: str
    tensor: LazyTensor | None = None
    shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()


def write_megatron(
    source: WeightSource,
    save: Path,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    is_stacked: bool = True,
    is_te: bool = True,
) -> None:
    """Writes `save`/release (`save`/iter_N where the source has an optimizer) and `save`/latest_checkpointed_iteration.txt in place.

    `is_stacked`: one tensor for all layers, Megatron-LM's default, or a key for each. `is_te`: with the empty entries that Transformer
    Engine's layers ask for, or those of --transformer-impl local. Main weights and moments are kept in their dtype, the model's go to
    `dtype`. Raises UserError for a model that Megatron-LM cannot hold.
    """
    model, state = source.model, source.optimizer
    rows = math.ceil(model.vocab_size / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    arguments = arguments_for_megatron(source, rows, dtype or source.dtype, is_te)
    name = "release" if state is None else f"iter_{state.iteration:07d}"
    folder = save / name
    folder.mkdir()
    sets = {"": {name: cast(tensor, dtype) for name, tensor in source.weights.items()}}
    if state is not None:
        sets |= {f"{STATE}param.": source.weights, f"{STATE}exp_avg.": state.exp_avg, f"{STATE}exp_avg_sq.": state.exp_avg_sq}
    chunks = [chunk for prefix, weights in sets.items() for chunk in _chunks(prefix, weights, model, rows, is_stacked)]
    chunks += [_Chunk(key) for key in _empty_states(model, is_stacked, is_te)]
    files = [chunks[number::_FILES] for number in range(_FILES)]
    places: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
    write_in_parallel([partial(_write_file, folder, f"__{i}_0.distcp", part, places) for i, part in enumerate(files)], workers)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(_metadata(chunks, places)))
    torch.save(_common(source, arguments, is_stacked), folder / COMMON_FILE)
    (folder / FORMAT_FILE).write_text(_FORMAT)
    generation = write_tokenizer(source, folder, "any")  # Megatron-LM does not look for these; without them they would be lost on the way
    (folder / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n")
    (save / LATEST_FILE).write_text(str(state.iteration) if state is not None else "release")


def _common(source: WeightSource, arguments, is_stacked: bool) -> dict:
    """What common.pt holds: Megatron-LM takes the form of the keys from content_metadata."""
    form = {"singleton_local_shards": False, "non_homogeneous_layers": not is_stacked}
    common = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": form}
    state = source.optimizer
    if state is None:
        return common
    form |= {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    optimizer = {"optimizer": {"param_groups": optimizer_groups(state)}, "param_state_sharding_type": "fully_reshardable"}
    return common | {"iteration": state.iteration, "optimizer": optimizer, "opt_param_scheduler": scheduler_state(state)}


def _chunks(prefix: str, weights: Mapping[str, LazyTensor], model: ModelConfig, rows: int, is_stacked: bool) -> Iterator[_Chunk]:
    for name, key in OUTER.items():
        if name in weights:
            tensor = weights[name] if name == "norm.weight" else _padded(weights[name], rows)
            yield _Chunk(prefix + key, tensor, tensor.shape, (0,) * len(tensor.shape))
    for number in range(model.num_layers):
        start = f"layers.{number}."
        layer = {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}
        for key, tensor in fuse_layer(layer, model).items():
            if is_stacked:
                shape, offsets = (model.num_layers, *tensor.shape), (number, *(0 for _ in tensor.shape))
                yield _Chunk(f"{prefix}decoder.layers.{key}", with_leading(tensor), shape, offsets)
            else:
                yield _Chunk(f"{prefix}decoder.layers.{number}.{key}", tensor, tensor.shape, (0,) * len(tensor.shape))


def _padded(tensor: LazyTensor, rows: int) -> LazyTensor:
    """With zeros behind the vocabulary."""
    missing = rows - tensor.shape[0]
    zeros = LazyTensor(
        (missing, *tensor.shape[1:]), tensor.dtype, lambda start, stop: torch.zeros(stop - start, *tensor.shape[1:], dtype=tensor.dtype)
    )
    return concatenate([tensor, zeros], 0) if missing else tensor


def _empty_states(model: ModelConfig, is_stacked: bool, is_te: bool) -> Iterator[str]:
    for number in range(model.num_layers):
        for module in (*_LOCAL_STATES, *(_TE_STATES if is_te else ())):
            where = ("", f"{number}_{model.num_layers}") if is_stacked else (f"{number}.", "0_1")
            yield f"decoder.layers.{where[0]}{module}._extra_state/shard_{where[1]}"
    for module in _TE_OUTER_STATES if is_te else ():
        yield f"{module}._extra_state/shard_0_1"


def _write_file(folder: Path, name: str, chunks: list[_Chunk], places: dict) -> None:
    """One .distcp file: for each chunk what torch.save writes, back to back. Notes where each one lies."""
    empty = io.BytesIO()
    torch.save([None], empty)
    with FileWriter(folder / name) as file:
        for chunk in chunks:
            offset = file.position
            if chunk.tensor is None:
                file.write([empty.getvalue()])
                index = metadata.MetadataIndex(chunk.key)
            else:
                write_archive(file, chunk.tensor)
                index = metadata.MetadataIndex(chunk.key, torch.Size(chunk.offsets))
            places[index] = filesystem._StorageInfo(name, offset, file.position - offset)


def _metadata(chunks: list[_Chunk], places: dict) -> metadata.Metadata:
    entries: dict = {}
    for chunk in chunks:
        if chunk.tensor is None:
            entries[chunk.key] = metadata.BytesStorageMetadata()
            continue
        if chunk.key not in entries:
            properties = metadata.TensorProperties(dtype=chunk.tensor.dtype)
            entries[chunk.key] = metadata.TensorStorageMetadata(properties, torch.Size(chunk.shape), [])
        part = metadata.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.tensor.shape))
        entries[chunk.key].chunks.append(part)
    return metadata.Metadata(entries, {}, places, version="1.0.0")
