"""LazyTensor: a weight that is still on disk, read a block of rows at a time.

Every reader gives these and every writer takes them, so a conversion holds a block of rows in memory, never a model, and a chain of changes
(permute, cast, concatenate the shards) is applied to each block as it passes.
"""

import mmap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.run import RunConfig

BLOCK_BYTES = 8 << 20

# A read-only mapping gives a read-only tensor; torch warns once about it, and nothing here writes to one.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")


@dataclass(frozen=True)
class LazyTensor:
    """Shape, dtype, and `rows(start, stop)`: rows start..stop of dimension 0, a read-only view of a mapped file where possible."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor. It may be a read-only view: clone it before writing to it."""
        return self.rows(0, self.shape[0])

    def blocks(self) -> Iterator[torch.Tensor]:
        """The tensor as contiguous blocks of rows, each of about BLOCK_BYTES, at least one row."""
        row_bytes = max(1, prod(self.shape[1:]) * self.dtype.itemsize)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0])).contiguous()


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state on disk, by our names and in our row order, and how far its run had come."""

    exp_avg: dict[str, LazyTensor]
    exp_avg_sq: dict[str, LazyTensor]
    step: int
    """updates that Adam has counted"""
    iteration: int
    consumed_samples: int
    consumed_tokens: int
    run: RunConfig
    """what is known of the run: schedule, batch and sequence length"""


@dataclass(frozen=True)
class WeightSource:
    """A model on disk: its config, its weights under our names and in our row order, and what travels with it.

    `assets` are tokenizer files (name: content), `generation` the content of generation_config.json (token ids, sampling defaults).
    """

    model: ModelConfig
    weights: dict[str, LazyTensor]
    assets: dict[str, bytes] = field(default_factory=dict)
    generation: dict = field(default_factory=dict)
    chat_template: str | None = None
    optimizer: OptimizerState | None = None
    """None where it is not there, or not asked for; where it is, `weights` are the optimizer's main ones"""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, which config files name as the model's."""
        return self.weights["tok_embeddings.weight"].dtype

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all weights, in `dtype` where given."""
        return sum(prod(tensor.shape) * (dtype or tensor.dtype).itemsize for tensor in self.weights.values())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy; numpy has no bfloat16, so through uint8."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def from_tensor(tensor: torch.Tensor) -> LazyTensor:
    """A tensor in memory behind the same interface."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])


def map_file(path: Path) -> mmap.mmap:
    """The file as read-only shared memory: page cache, not memory of this process."""
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def from_mapping(mapping: mmap.mmap, offset: int, shape: Sequence[int], dtype: torch.dtype) -> LazyTensor:
    """A contiguous tensor that starts `offset` bytes into a mapped file."""
    row_elements = prod(shape[1:])

    def rows(start: int, stop: int) -> torch.Tensor:
        count = (stop - start) * row_elements
        if count == 0:
            return torch.empty(stop - start, *shape[1:], dtype=dtype)
        begin = offset + start * row_elements * dtype.itemsize
        if begin % dtype.itemsize == 0:
            flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=begin)
        else:  # a tensor on an odd address is undefined behaviour: copy
            flat = torch.frombuffer(bytearray(mapping[begin : begin + count * dtype.itemsize]), dtype=dtype)
        return flat.view(stop - start, *shape[1:])

    return LazyTensor(tuple(shape), dtype, rows)


def cast(tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """The tensor in another dtype, converted block by block; None leaves it."""
    if dtype is None or dtype == tensor.dtype:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda start, stop: tensor.rows(start, stop).to(dtype))


def reorder_rows(tensor: LazyTensor, order: torch.Tensor) -> LazyTensor:
    """Row i of the result is row order[i] of `tensor`. Orders here stay within a head: a block reads little more than itself."""

    def rows(start: int, stop: int) -> torch.Tensor:
        wanted = order[start:stop]
        first, last = int(wanted.min()), int(wanted.max())
        return tensor.rows(first, last + 1).index_select(0, wanted - first)

    return LazyTensor(tensor.shape, tensor.dtype, rows)


def concatenate(parts: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """Shards of one tensor, side by side along dimension 0 or 1."""
    if len(parts) == 1:
        return parts[0]
    if dim == 1:
        shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
        return LazyTensor(shape, parts[0].dtype, lambda start, stop: torch.cat([part.rows(start, stop) for part in parts], dim=1))
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.shape[0])

    def rows(start: int, stop: int) -> torch.Tensor:
        pieces = []
        for part, offset in zip(parts, starts):
            low, high = max(start - offset, 0), min(stop - offset, part.shape[0])
            if low < high:
                pieces.append(part.rows(low, high))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return LazyTensor((starts[-1], *parts[0].shape[1:]), parts[0].dtype, rows)


def narrow(tensor: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    """A shard: `length` rows (dim 0) or columns (dim 1) from `start` on."""
    if dim == 0:
        return LazyTensor((length, *tensor.shape[1:]), tensor.dtype, lambda low, high: tensor.rows(start + low, start + high))
    shape = (tensor.shape[0], length)
    return LazyTensor(shape, tensor.dtype, lambda low, high: tensor.rows(low, high)[:, start : start + length])


@dataclass(frozen=True)
class _WithLeading(LazyTensor):
    inner: LazyTensor

    def blocks(self) -> Iterator[torch.Tensor]:
        return self.inner.blocks()


def with_leading(tensor: LazyTensor) -> LazyTensor:
    """[...] -> [1, ...]; its blocks are still small."""
    return _WithLeading((1, *tensor.shape), tensor.dtype, lambda start, stop: tensor.read().unsqueeze(0)[start:stop], tensor)


def without_leading(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """[1, ...] -> `shape`, the same without dimensions of size 1 in front."""
    return LazyTensor(shape, tensor.dtype, lambda start, stop: tensor.read().view(shape)[start:stop])


def equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Bitwise equality, block by block."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)) for x, y in zip(a.blocks(), b.blocks()))
