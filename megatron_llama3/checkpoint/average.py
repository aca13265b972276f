"""The mean of several checkpoints' weights, a block of rows at a time: Polyak averaging at the end of annealing (paper, section 3.4.3) and
model averaging in alignment (section 4.1.5)."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, WeightSource
from megatron_llama3.config.errors import UserError


def averaging_weights(count: int, decay: float | None) -> list[float]:
    """Shares of `count` checkpoints in order of age, summing to 1: equal, or those of the exponential mean in which each checkpoint
    moves the mean by 1 - decay (the first is where it starts)."""
    if decay is None:
        return [1 / count] * count
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def average(sources: Sequence[WeightSource], shares: Sequence[float], names: Sequence[str]) -> WeightSource:
    """The first source with every weight replaced by the mean, summed in float64 and stored in the first one's dtype.

    Raises UserError where the models differ; `names` are what the message calls them.
    """
    for source, name in zip(sources[1:], names[1:], strict=True):
        if source.model != sources[0].model:
            raise UserError(f"{name} and {names[0]} are different models and cannot be averaged")
    weights = {name: _mean([source.weights[name] for source in sources], shares) for name in sources[0].weights}
    return replace(sources[0], weights=weights)


def _mean(tensors: list[LazyTensor], shares: Sequence[float]) -> LazyTensor:
    def rows(start: int, stop: int) -> torch.Tensor:
        total = sum(share * tensor.rows(start, stop).double() for share, tensor in zip(shares, tensors, strict=True))
        return total.to(tensors[0].dtype)

    return LazyTensor(tensors[0].shape, tensors[0].dtype, rows)
