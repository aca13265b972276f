"""Context parallelism as the paper has it (section 3.3.2): the sequence is cut into 2*CP chunks, rank i holds chunks i and 2*CP-1-i, and
keys and values are all-gathered, so that any mask works and the causal work is even."""

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_llama3.parallel.collectives import all_gather_first_dim, reduce_scatter_first_dim


def chunk_ranges(seq_length: int, cp_size: int, cp_rank: int) -> list[tuple[int, int]]:
    """The [start, end) ranges of the whole sequence that a rank holds, in order: one for CP 1, two otherwise."""
    if cp_size == 1:
        return [(0, seq_length)]
    # An early chunk with a late one: under a causal mask each rank then has the same number of (query, key) pairs.
    size = seq_length // (2 * cp_size)
    return [(c * size, (c + 1) * size) for c in (cp_rank, 2 * cp_size - 1 - cp_rank)]


def local_positions(seq_length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Positions in the whole sequence of the tokens a rank holds, int64 [seq_length / cp_size]."""
    return torch.cat([torch.arange(start, end) for start, end in chunk_ranges(seq_length, cp_size, cp_rank)])


class _GatherInOrder(Function):
    """All-gather along the sequence, chunks put back in order; in backward each rank's chunks of the summed gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        pairs = all_gather_first_dim(x, group).unflatten(0, (2 * group.size(), -1))  # [2*CP chunks as held, s/(2*CP), ...]
        return pairs[_order(group.size(), x.device, inverse=True)].flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        chunks = grad.unflatten(0, (2 * ctx.group.size(), -1))
        # Back into the order in which ranks hold them; every rank's queries had a part in every key's gradient, hence the sum.
        pairs = chunks[_order(ctx.group.size(), grad.device)].flatten(0, 1)
        return reduce_scatter_first_dim(pairs, ctx.group), None


@cache
def _order(cp_size: int, device: torch.device, inverse: bool = False) -> Tensor:
    """Chunk numbers in the order in which the ranks hold them: 0, 2*CP-1, 1, 2*CP-2, ..."""
    held = torch.tensor([c for i in range(cp_size) for c in (i, 2 * cp_size - 1 - i)], device=device)
    return torch.argsort(held) if inverse else held


def gather_keys_values(keys: Tensor, values: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[s/cp, b, heads, d] each on every rank -> [s, b, heads, d] each, in the order of the sequence, by one collective."""
    if group.size() == 1:
        return keys, values
    # Stacked behind the sequence, the dimension that is gathered: one message instead of two small ones.
    return _GatherInOrder.apply(torch.stack([keys, values], dim=1), group).unbind(1)
