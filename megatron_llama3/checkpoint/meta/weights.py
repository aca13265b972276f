"""Meta's folders in and out: `params.json` beside one `consolidated.NN.pth` for each model-parallel rank.

Reading runs no code from the files (checkpoint/files/torch_archive.py). Writing streams: a 100 GB shard takes a block of rows of memory.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_llama3.checkpoint.files.file_writer import FileWriter
from megatron_llama3.checkpoint.files.foreign_config import read_json
from megatron_llama3.checkpoint.files.publish import write_in_parallel
from megatron_llama3.checkpoint.files.torch_archive import read_archive
from megatron_llama3.checkpoint.files.torch_archive_writer import write_archive
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, WeightSource, cast, concatenate, equal, map_file, narrow
from megatron_llama3.checkpoint.meta.params import config_from_meta, config_to_meta
from megatron_llama3.checkpoint.names import check_weights, weight_shapes
from megatron_llama3.checkpoint.tokenizer_files import tokenizer_assets, write_tokenizer
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.sharding import WeightSpec, weight_table

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_GENERATION = "generation_config.json"
_CONSTANTS = {"rope.freqs"}  # stored by early releases, computed by everyone


def open_meta(folder: str | Path) -> WeightSource:
    """The model in Meta's folder: its shards joined, duplicated KV heads reduced to one (and checked equal when they are read).

    Raises UserError for a missing shard, a truncated or poisoned file, or weights that do not fit params.json.
    """
    folder = Path(folder)
    params = read_json(folder / "params.json")
    shards = _open_shards(folder)
    joined = {name: _join(name, [shard[name] for shard in shards], folder) for name in _names(shards, folder)}
    for name in (_EMBEDDING, "layers.0.feed_forward.w1.weight"):
        if name not in joined:
            raise UserError(f"{folder}: {name} is missing: not a Llama 3 model")
    output = joined.get(_OUTPUT)
    tied = output is None or equal(output, joined[_EMBEDDING])  # params.json does not say; Meta's files hold the output layer twice
    if tied:
        joined.pop(_OUTPUT, None)
    where = f"{folder / 'params.json'} with {len(shards)} shard{'s' if len(shards) > 1 else ''}"
    ffn = joined["layers.0.feed_forward.w1.weight"].shape[0]
    model = config_from_meta(params, joined[_EMBEDDING].shape[0], ffn, tied, where)
    joined = _without_duplicated_heads(joined, model, len(shards))
    shapes = weight_shapes(model, len(joined), where)
    check_weights({name: tensor.shape for name, tensor in joined.items()}, shapes, where)
    generation = read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    return WeightSource(model, {name: joined[name] for name in shapes}, tokenizer_assets(folder), generation)


def write_meta(
    source: WeightSource, folder: Path, num_shards: int = 1, dtype: torch.dtype | None = None, workers: int | None = None
) -> None:
    """Writes the whole folder in place: params.json, the tokenizer, `num_shards` files. Raises UserError if the model does not divide."""
    check_shards(source.model, num_shards)
    weights = {name: cast(tensor, dtype) for name, tensor in source.weights.items()}
    weights.setdefault(_OUTPUT, weights[_EMBEDDING])  # Meta's code loads it by name from tied models too
    (folder / "params.json").write_text(json.dumps(config_to_meta(source.model, num_shards)) + "\n")
    generation = write_tokenizer(source, folder, "meta")
    if generation:  # Meta's code does not look for it; without it the token ids would be lost on the way through
        (folder / _GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
    table = weight_table(source.model) | {_OUTPUT: weight_table(source.model)[_EMBEDDING]}
    tasks = []
    for rank in range(num_shards):
        shard = {name: _cut(tensor, table[name], num_shards, rank) for name, tensor in weights.items()}
        tasks.append(partial(_write_shard, folder / f"consolidated.{rank:02d}.pth", shard))
    write_in_parallel(tasks, workers)


def check_shards(model: ModelConfig, num_shards: int) -> None:
    """Raises UserError unless heads, feed-forward and vocabulary divide by the number of shards (KV heads may also divide it)."""
    if num_shards < 1:
        raise UserError(f"--target-model-parallel-size {num_shards}: at least 1 shard is needed")
    sizes = {"query heads": model.num_attention_heads, "feed-forward columns": model.ffn_hidden_size, "vocabulary rows": model.vocab_size}
    for what, size in sizes.items():
        if size % num_shards:
            raise UserError(f"--target-model-parallel-size {num_shards} does not divide the {size} {what}")
    if model.num_query_groups % num_shards and num_shards % model.num_query_groups:
        heads = model.num_query_groups
        raise UserError(f"--target-model-parallel-size {num_shards} neither divides nor is a multiple of the {heads} KV heads")


def _write_shard(path: Path, tensors: dict[str, LazyTensor]) -> None:
    with FileWriter(path) as file:
        write_archive(file, tensors)


def _cut(tensor: LazyTensor, spec: WeightSpec, num_shards: int, rank: int) -> LazyTensor:
    if spec.split_dim is None:
        return tensor
    units = spec.shape[spec.split_dim] // spec.unit
    if units < num_shards:  # fewer KV heads than shards: each is written several times
        return narrow(tensor, 0, rank * units // num_shards * spec.unit, spec.unit)
    length = spec.shape[spec.split_dim] // num_shards
    return narrow(tensor, spec.split_dim, rank * length, length)


def _open_shards(folder: Path) -> list[dict[str, LazyTensor]]:
    matches = {path: re.fullmatch(r"consolidated\.(\d+)\.pth", path.name) for path in folder.glob("consolidated.*.pth")}
    numbers = {int(match[1]): path for path, match in matches.items() if match}
    if not numbers:
        raise UserError(f"{folder}: no consolidated.NN.pth is there")
    for number in range(max(numbers) + 1):
        if number not in numbers:
            raise UserError(f"{folder}: consolidated.{number:02d}.pth is missing, consolidated.{max(numbers):02d}.pth is there")
    shards = []
    for number in sorted(numbers):
        shard = read_archive(map_file(numbers[number]), numbers[number])
        if not isinstance(shard, dict) or not all(isinstance(n, str) and isinstance(t, LazyTensor) for n, t in shard.items()):
            raise UserError(f"{numbers[number]}: not a dict of tensors by name")
        shards.append({name: tensor for name, tensor in shard.items() if name not in _CONSTANTS})
    return shards


def _names(shards: list[dict[str, LazyTensor]], folder: Path) -> list[str]:
    for number, shard in enumerate(shards):
        if shard.keys() != shards[0].keys():
            name = sorted(shard.keys() ^ shards[0].keys())[0]
            raise UserError(f"{folder}: {name} is not in both consolidated.00.pth and consolidated.{number:02d}.pth")
    return list(shards[0])


def _join(name: str, parts: list[LazyTensor], folder: Path) -> LazyTensor:
    """One weight from its shards: norms are the same in all, wo and w2 are cut along columns, the rest along rows."""
    if len({(part.dtype, len(part.shape), part.shape[1:]) for part in parts}) > 1:
        raise UserError(f"{folder}: the shards of {name} differ in dtype or shape")
    if len(parts[0].shape) == 1:
        return _same(name, parts)
    return concatenate(parts, dim=1 if name.endswith((".wo.weight", ".w2.weight")) else 0)


def _same(name: str, copies: Sequence[LazyTensor]) -> LazyTensor:
    """The one tensor that several copies hold. Raises UserError, when read, where they differ."""

    def rows(start: int, stop: int) -> torch.Tensor:
        first = copies[0].rows(start, stop)
        for other in copies[1:]:
            if not torch.equal(first, other.rows(start, stop)):
                raise UserError(f"{name}: copies that should be equal differ between the model-parallel shards")
        return first

    return LazyTensor(copies[0].shape, copies[0].dtype, rows)


def _without_duplicated_heads(joined: dict[str, LazyTensor], model: ModelConfig, num_shards: int) -> dict[str, LazyTensor]:
    """Reduces KV heads that were written once for each shard, and the count of them in `model`.

    Two forms are known: `n_kv_heads` counts the copies (Meta's 16-way 405B), or it counts the heads and the weights have more rows.
    """
    first = "layers.0.attention.wk.weight"
    stored = joined[first].shape[0] // model.head_dim if first in joined else model.num_query_groups
    if stored != model.num_query_groups:
        copies = stored // model.num_query_groups
    elif stored == num_shards:
        copies = _copies_in(joined[first], stored, model.head_dim)
    else:
        copies = 1
    if copies <= 1 or stored % copies:
        return joined
    model.num_query_groups = stored // copies
    reduce = {name for name in joined if name.endswith((".wk.weight", ".wv.weight"))}
    return {name: _one_of(name, tensor, copies, model.head_dim) if name in reduce else tensor for name, tensor in joined.items()}


def _copies_in(tensor: LazyTensor, heads: int, head_dim: int) -> int:
    """The largest n for which every n heads in a row are equal."""
    blocks = [tensor.rows(i * head_dim, (i + 1) * head_dim) for i in range(heads)]
    divisors = (n for n in range(heads, 1, -1) if heads % n == 0)
    return next((n for n in divisors if all(torch.equal(blocks[i], blocks[i - i % n]) for i in range(heads))), 1)


def _one_of(name: str, tensor: LazyTensor, copies: int, head_dim: int) -> LazyTensor:
    """Every `copies`-th head of `tensor`, the others checked equal to it when read."""
    heads = tensor.shape[0] // head_dim
    slices = [narrow(tensor, 0, i * head_dim, head_dim) for i in range(heads)]
    return concatenate([_same(name, slices[i : i + copies]) for i in range(0, heads, copies)], dim=0)
