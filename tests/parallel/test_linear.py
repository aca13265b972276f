"""Linear layers of one input: values and gradients by plain autograd, what runs when, and what is put off."""

import pytest
import torch
from torch import Tensor

from megatron_llama3.parallel import linear
from megatron_llama3.parallel.linear import Collectives, HowToRun, KeptInput, Linear, Recipe, here, linear_layers


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layers(count: int) -> list[Tensor]:
    return [draw(3 + i, 4, seed=i).requires_grad_() for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_products_of_layers_that_share_an_input(count):
    x, weights = draw(5, 2, 4), [w.detach() for w in layers(count)]
    grads = [draw(5, 2, len(w), seed=9) for w in weights]
    product = Linear()
    for grad, weight in zip(grads, weights):
        torch.testing.assert_close(product.output(x, weight), torch.einsum("sbi,oi->sbo", x, weight))
        torch.testing.assert_close(product.weight_gradient(grad, x), torch.einsum("sbo,sbi->oi", grad, x))
    before = [grad.clone() for grad in grads]
    expected = sum(torch.einsum("sbo,oi->sbi", grad, weight) for grad, weight in zip(grads, weights))
    torch.testing.assert_close(product.input_gradient(grads, weights), expected)
    assert all(map(torch.equal, grads, before))


class Twice:
    """Collectives of a group whose two ranks hold the same: what is gathered is there twice, what is summed is cut in two halves."""

    def __init__(self):
        self.events = []

    def gather(self, x: Tensor):
        self.events.append("gather starts")
        return lambda: self.events.append("gathered") or torch.cat([x, x])

    def sum(self, x: Tensor):
        self.events.append("sum starts")
        return lambda: self.events.append("summed") or sum(x.chunk(2))


class Noted(Linear):
    def __init__(self, events: list):
        self.events = events

    def input_gradient(self, grads, weights):
        self.events.append("input gradient")
        return super().input_gradient(grads, weights)

    def weight_gradient(self, grad, x):
        self.events.append("weight gradient")
        return super().weight_gradient(grad, x)


class Later:
    def __init__(self):
        self.kept: list[tuple[KeptInput, list]] = []

    def defer(self, kept, grads) -> None:
        self.kept.append((kept, grads))


def run(
    x: Tensor, weights: list[Tensor], is_deferred: bool = False, recipe: Recipe | None = None
) -> tuple[Twice, Later, tuple[Tensor, ...]]:
    group, later = Twice(), Later()
    how = HowToRun(Noted(group.events), Collectives(group.gather, group.sum), later if is_deferred else None)
    outputs = linear_layers(how, x, weights, recipe)
    assert group.events == ["gather starts", "gathered"]
    group.events.clear()
    torch.autograd.backward(outputs, [draw(*y.shape, seed=7) for y in outputs])
    return group, later, outputs


def expected_of(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Outputs, the input's gradient, the weights' gradients."""
    x, weights = x.detach().clone().requires_grad_(), [w.detach().clone().requires_grad_() for w in weights]
    outputs = [torch.cat([x, x]) @ w.T for w in weights]
    torch.autograd.backward(outputs, [draw(*y.shape, seed=7) for y in outputs])
    return [*outputs, x.grad, *(w.grad for w in weights)]


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_with_a_gathered_input_and_what_runs_beside_what(count):
    x, weights = draw(5, 2, 4, seed=5).requires_grad_(), layers(count)
    group, _, outputs = run(x, weights)
    torch.testing.assert_close([*outputs, x.grad, *(w.grad for w in weights)], expected_of(x, weights))
    beside = ["gather starts", "input gradient", "sum starts", "gathered", *count * ["weight gradient"], "summed"]
    assert group.events == beside


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_frozen_weights_and_frozen_inputs(frozen):
    x, weights = draw(5, 2, 4, seed=5).requires_grad_(), layers(2)
    for i in frozen:
        weights[i].requires_grad_(False)
    group, _, _ = run(x, weights)
    *_, x_grad, first, second = expected_of(x, weights)
    torch.testing.assert_close(x.grad, x_grad)
    for i, wanted in enumerate((first, second)):
        assert (weights[i].grad is None) == (i in frozen)
        if i not in frozen:
            torch.testing.assert_close(weights[i].grad, wanted)
    assert ("gather starts" in group.events) == (len(frozen) < 2), "nothing is gathered for nothing"
    group, _, _ = run(x.detach(), layers(2))
    assert group.events == ["gather starts", "gathered", "weight gradient", "weight gradient"]


@pytest.mark.parametrize("frozen", [(), (1,), (0, 1)])
def test_put_off_weight_halves(frozen):
    x, weights = draw(5, 2, 4, seed=5).requires_grad_(), layers(2)
    for i in frozen:
        weights[i].requires_grad_(False)
    group, later, _ = run(x, weights, is_deferred=True)
    *_, x_grad, first, second = expected_of(x, weights)
    torch.testing.assert_close(x.grad, x_grad)
    assert group.events == ["input gradient", "sum starts", "summed"], "the gathering waits too"
    assert weights[0].grad is weights[1].grad is None
    if len(frozen) == 2:
        assert later.kept == []
        return
    ((kept, grads),) = later.kept
    assert [weight is weights[i] for i, (weight, _) in enumerate(grads)] == [True] * (2 - len(frozen))
    gathered = kept.start()()
    torch.testing.assert_close([Linear().weight_gradient(grad, gathered) for _, grad in grads], [first, second][: 2 - len(frozen)])


def test_an_input_that_is_made_again():
    source, weights, made = draw(5, 2, 4, seed=5), layers(2), []

    def make(source: Tensor, factor: Tensor) -> Tensor:
        made.append(1)
        return source * factor

    x = (2 * source).requires_grad_()
    run(x, weights, recipe=Recipe(make, (source, torch.tensor(2.0, dtype=torch.float64))))
    assert made == [1], "in the backward pass, once"
    *_, x_grad, first, second = expected_of(x, weights)
    torch.testing.assert_close([x.grad, *(w.grad for w in weights)], [x_grad, first, second])


def test_without_collectives_nothing_is_copied():
    x = draw(5, 2, 4)
    assert here(x)() is x
    assert Collectives() == (here, here)


def test_a_compiler_is_told_that_gathering_again_needs_the_gradient():
    x, grad, seen = draw(3, 2), draw(4, 2), []

    def gather(x: Tensor):
        seen.append(x)
        return "pending"

    assert linear._gather_in_backward(here, grad) is here
    assert linear._gather_in_backward(gather, grad)(x) == "pending"
    assert torch.equal(seen[0], x)
    assert seen[0].data_ptr() != x.data_ptr(), "an operator may not return its input"
    assert torch.ops.megatron_llama3.not_before(x.to("meta"), grad.to("meta")).shape == x.shape
