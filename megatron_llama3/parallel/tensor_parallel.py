"""Tensor and sequence parallelism: column, row and vocabulary layers over one group.

Shapes: s = sequence on this rank before gathering, b = micro-batch, h = hidden size, t = TP size.
"""

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_llama3.parallel.collectives import (
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    reduce_scatter_sequence,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_llama3.parallel.linear import Collectives, HowToRun, Linear, Recipe, WeightHalves, linear_layers


def local_part(weight: Tensor) -> Tensor:
    """This rank's part of a weight that an engine may have turned into a DTensor."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class TensorParallel:
    """What a layer needs to know of tensor parallelism: the group, whether activations between blocks are cut along the sequence, and
    how products are run: by `linear`, the weights' half of their backward pass put off where there is `deferred`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        sequence_parallel: bool = False,
        linear: Linear | None = None,
        deferred: WeightHalves | None = None,
    ):
        self.group = group
        self.size = group.size()
        self.rank = dist.get_rank(group)
        self.sequence_parallel = sequence_parallel and self.size > 1
        linear = linear or Linear()
        self._columns = HowToRun(linear, self._collectives(), deferred)
        self._rows = HowToRun(linear, Collectives(), deferred)

    def columns(self, x: Tensor, weights: Sequence[Tensor], recipe: Recipe | None = None) -> tuple[Tensor, ...]:
        """Column layers that share the input x [s/t or s, b, h] -> [s, b, out/t] for each weight [out/t, h]."""
        return linear_layers(self._columns, x, weights, recipe)

    def row(self, x: Tensor, weight: Tensor, recipe: Recipe | None = None) -> Tensor:
        """A row layer: x [s, b, in/t], weight [h, in/t] -> [s/t or s, b, h], summed over the group."""
        (partial_sum,) = linear_layers(self._rows, x, [weight], recipe)
        return self.reduce_output(partial_sum)

    def gather_input(self, x: Tensor) -> Tensor:
        """Before the output layer. [s/t or s, b, h] -> [s, b, h]; in backward the input's gradient is summed over the group."""
        return gather_sequence(x, self.group) if self.sequence_parallel else copy_to_group(x, self.group)

    def reduce_output(self, x: Tensor) -> Tensor:
        """After row layers. Partial sums [s, b, h] -> their sum, [s/t, b, h] with sequence parallelism."""
        return reduce_scatter_sequence(x, self.group) if self.sequence_parallel else reduce_from_group(x, self.group)

    def _collectives(self) -> Collectives:
        if self.size == 1:
            return Collectives()
        if self.sequence_parallel:
            return Collectives(partial(start_all_gather, group=self.group), partial(start_reduce_scatter, group=self.group))
        return Collectives(sum=partial(start_all_reduce, group=self.group))


class ParallelLinear(nn.Module):
    """One weight [out, in], or this rank's rows (column parallel) or columns (row parallel) of it. The products are the caller's
    (`TensorParallel.columns` and `row`): several column layers share one gathered input."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    @property
    def local(self) -> Tensor:
        return local_part(self.weight)


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of the embedding matrix, `first_row` onward (torch.chunk's split, which may be uneven)."""

    def __init__(self, weight: Tensor, first_row: int, tp: TensorParallel):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.first_row = first_row
        self.tp = tp

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [s, b] -> [s, b, h], or [s/t, b, h] with sequence parallelism."""
        weight = local_part(self.weight)
        if self.tp.size == 1:
            return F.embedding(tokens, weight)
        row = tokens - self.first_row  # of this rank's [V/t, h]; a token of another rank's rows gives zeros here, and the sum finds it
        elsewhere = (row < 0) | (row >= weight.shape[0])
        found = F.embedding(row.masked_fill(elsewhere, 0), weight)
        return self.tp.reduce_output(found.masked_fill(elsewhere.unsqueeze(-1), 0))
