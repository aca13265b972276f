"""Collectives as forward and backward pairs, each the identity on a group of one. All work along dimension 0, the sequence.

| function                 | forward        | backward       | where                                             |
|--------------------------|----------------|----------------|---------------------------------------------------|
| copy_to_group            | identity       | all-reduce     | into column layers without sequence parallelism   |
| reduce_from_group        | all-reduce     | identity       | out of row layers without sequence parallelism    |
| gather_sequence          | all-gather     | reduce-scatter | into column layers with sequence parallelism      |
| reduce_scatter_sequence  | reduce-scatter | all-gather     | out of row layers with sequence parallelism       |
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

# torch 2.13 renamed these two; 2.11 has the old names only.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather_first_dim(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s, ...] on each rank -> [s * group size, ...] in rank order. No gradient."""
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


def reduce_scatter_first_dim(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s * group size, ...] on each rank -> this rank's [s, ...] of the sum. No gradient."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group, in a new tensor. No gradient."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


# --- collectives that run beside what comes next, in a compiled block too. No gradients. ---

Pending = Callable[[], Tensor]
"""Waits for a collective and returns its result. Until then nobody may write into what went in."""

_started = torch.ops._c10d_functional


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begins `all_gather_first_dim`."""
    return partial(_started.wait_tensor, _started.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begins `reduce_scatter_first_dim`."""
    return partial(_started.wait_tensor, _started.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name))


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begins the sum over the group, in place where `x` is contiguous."""
    return partial(_started.wait_tensor, _started.all_reduce_(x.contiguous(), "sum", group.group_name))


class _CopyToGroup(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)  # autograd wants another tensor than the input, and a view costs nothing

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None  # each rank's columns give a part of the input's gradient


class _ReduceFromGroup(Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None  # the sum is the same on all ranks, and so is its gradient


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather_first_dim(x, group)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter_first_dim(grad, ctx.group), None


class _ReduceScatterSequence(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return reduce_scatter_first_dim(x, group)

    @staticmethod
    def backward(ctx, grad):
        return all_gather_first_dim(grad, ctx.group), None


def copy_to_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x if group.size() == 1 else _CopyToGroup.apply(x, group)


def reduce_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x if group.size() == 1 else _ReduceFromGroup.apply(x, group)


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x if group.size() == 1 else _GatherSequence.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x if group.size() == 1 else _ReduceScatterSequence.apply(x, group)
