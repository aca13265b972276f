"""Linear layers that share one input: their products, what they keep for the backward pass, and the collectives that run beside the
products, as in Megatron-LM's LinearWithGradAccumulationAndAsyncCommunication.

    forward   all-gather x; one product a layer; the gathered x is dropped
    backward  all-gather x again        while the products of the input's gradient run
              reduce-scatter their sum  while the products of the weights' gradients run

Without sequence parallelism nothing is gathered and the sum is an all-reduce; row layers and a group of one need neither.
Shapes: s = sequence on this rank before gathering, b = micro-batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megatron_llama3.parallel.collectives import Pending


class Linear:
    """The products of a linear layer: the one place where FP8, a fused kernel or accumulation in float32 comes in."""

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """[s, b, in] by [out, in] -> [s, b, out]"""
        return F.linear(x, weight)

    def input_gradient(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The sum over layers of [s, b, out] by [out, in] -> [s, b, in]"""
        total = grads[0] @ weights[0]  # [s, b, in]; the others are added in the product itself, without a tensor of their own
        for grad, weight in zip(grads[1:], weights[1:]):
            total.flatten(0, -2).addmm_(grad.flatten(0, -2), weight)
        return total

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """[s, b, out] and [s, b, in] -> [out, in]"""
        return grad.flatten(0, -2).T @ x.flatten(0, -2)


def here(x: Tensor) -> Pending:
    """No collective: the tensor itself."""
    return lambda: x


class Collectives(NamedTuple):
    """What is started before the products, on their input, and after those of its gradient, on it."""

    gather: Callable[[Tensor], Pending] = here
    sum: Callable[[Tensor], Pending] = here


class Recipe(NamedTuple):
    """How an input is made again in the backward pass: `make` of tensors that are kept there anyway."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


class KeptInput(NamedTuple):
    """The input of linear layers as it is kept: this rank's part of it, as a recipe."""

    recipe: Recipe
    gather: Callable[[Tensor], Pending]

    def start(self) -> Pending:
        return self.gather(self.recipe.make(*self.recipe.tensors))


class WeightHalves(Protocol):
    """Takes the weights' half of backward passes, to run it later (zero bubble)."""

    def defer(self, kept: KeptInput, grads: list[tuple[Tensor, Tensor]]) -> None:
        """`grads`: (weight, gradient of its layer's output) of each layer"""


class HowToRun(NamedTuple):
    """What stays the same over a layer's calls."""

    linear: Linear
    collectives: Collectives
    deferred: WeightHalves | None


def linear_layers(how: HowToRun, x: Tensor, weights: Sequence[Tensor], recipe: Recipe | None = None) -> tuple[Tensor, ...]:
    """x [s, b, in] -> one [.., b, out] for each weight [out, in]. For the backward pass x itself is kept, or what `recipe` needs."""
    recipe = recipe or Recipe(lambda x: x, (x.detach(),))
    return _LinearLayers.apply(how, recipe.make, len(recipe.tensors), x, *recipe.tensors, *weights)


class _LinearLayers(Function):
    @staticmethod
    def forward(ctx, how, make, count, x, *tensors):
        ctx.how, ctx.make, ctx.count = how, make, count
        ctx.originals = tensors[count:] if how.deferred else ()  # saved ones, in a checkpoint, would not lead to the parameters
        ctx.save_for_backward(*tensors)
        gathered = how.collectives.gather(x)()
        return tuple(how.linear.output(gathered, weight) for weight in tensors[count:])

    @staticmethod
    def backward(ctx, *grads):
        how, kept = ctx.how, ctx.saved_tensors  # read once, or a checkpointed forward would run again
        tensors, weights = kept[: ctx.count], kept[ctx.count :]
        _, _, _, needs_x, *needed = ctx.needs_input_grad
        gather = _gather_in_backward(how.collectives.gather, grads[0]) if torch.compiler.is_compiling() else how.collectives.gather
        kept, needed = KeptInput(Recipe(ctx.make, tensors), gather), needed[ctx.count :]
        is_now = any(needed) and how.deferred is None
        # Started before the products that hide it, and awaited after them.
        arriving = kept.start() if is_now else None
        x_grad = how.collectives.sum(how.linear.input_gradient(grads, weights)) if needs_x else lambda: None
        weight_grads = [None] * len(weights)
        if is_now:
            gathered = arriving()
            weight_grads = [how.linear.weight_gradient(grad, gathered) if need else None for grad, need in zip(grads, needed)]
        elif any(needed):
            # Zero bubble: the gathering too waits for the weights' half.
            how.deferred.defer(kept, [(weight, grad) for weight, grad, need in zip(ctx.originals, grads, needed) if need])
        return None, None, None, x_grad(), *[None] * ctx.count, *weight_grads


def _gather_in_backward(gather: Callable[[Tensor], Pending], grad: Tensor) -> Callable[[Tensor], Pending]:
    """`gather` of what a compiler must believe to need `grad`: else it would gather in the forward pass already, and keep the result."""
    return gather if gather is here else lambda x: gather(_not_before(x, grad))


@torch.library.custom_op("megatron_llama3::not_before", mutates_args=())
def _not_before(x: Tensor, grad: Tensor) -> Tensor:
    return x.clone()  # an operator may not return its input


@_not_before.register_fake
def _(x: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(x)
