"""The values a weight starts from, the same under every layout."""

import hashlib
import math

import torch
from torch import Tensor

from megatron_llama3.model.sharding import WeightSpec

ROWS_BLOCK_ELEMENTS = 1 << 20


def initial_weight(name: str, spec: WeightSpec, seed: int, tp_size: int = 1, tp_rank: int = 0) -> Tensor:
    """This rank's part of a weight, float32 on the CPU, a function of (name, shape, seed) alone and so the same under every layout.

    Rows come in blocks with a generator each: a rank draws only the blocks that its rows lie in, and memory stays bounded.
    """
    weight = torch.empty(spec.local_shape(tp_size, tp_rank))
    if isinstance(spec.initial, str):
        return weight.fill_({"ones": 1.0, "zeros": 0.0}[spec.initial])
    dim = spec.split_dim_at(tp_size)
    start, end = (0, spec.shape[0]) if dim is None else spec.local_range(tp_size, tp_rank)
    first_row, last_row = (0, spec.shape[0]) if dim else (start, end)  # of another dimension than rows a rank takes its part of every row
    # Blocks begin at multiples of their height in the whole weight, not in a rank's part: their values are the same under any TP.
    block = max(1, ROWS_BLOCK_ELEMENTS // math.prod(spec.shape[1:]))
    for top in range(first_row - first_row % block, last_row, block):
        rows = min(block, spec.shape[0] - top)
        drawn = torch.randn(rows, *spec.shape[1:], generator=_generator(name, seed, top)) * spec.initial
        a, b = max(top, first_row), min(top + rows, last_row)
        piece = drawn[a - top : b - top]
        weight[a - first_row : b - first_row] = piece.narrow(dim, start, end - start) if dim else piece
    return weight


def _generator(name: str, seed: int, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{name}/{seed}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
