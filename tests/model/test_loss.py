"""The chunked loss equals the plain one, forward and backward, and never holds all logits."""

import resource

import pytest
import torch
import torch.distributed as dist

from megatron_llama3.model.loss import token_log_probs
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.planning.local_ranks import run_ranks

TOKENS, BATCH, HIDDEN, VOCABULARY = 15, 2, 8, 23


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, BATCH, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS, BATCH), generator=generator)
    grad = torch.randn(TOKENS, BATCH, generator=generator, dtype=dtype)
    return hidden, weight, targets, grad


def plain(dtype=torch.float64):
    hidden, weight, targets, grad = tensors(dtype)
    result = torch.log_softmax((hidden @ weight.T).to(torch.promote_types(dtype, torch.float32)), -1)
    result = result.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    result.backward(grad.to(result.dtype))
    return result.detach(), hidden.grad, weight.grad


def _chunked(chunk_size: int, dtype=torch.float64):
    """This rank's part of the vocabulary, torch.chunk's uneven split."""
    tp = TensorParallel(dist.group.WORLD)
    hidden, weight, targets, grad = tensors(dtype)
    rows = -(-VOCABULARY // tp.size)
    mine = weight.detach()[tp.rank * rows : (tp.rank + 1) * rows].clone().requires_grad_()
    result = token_log_probs(hidden, mine, targets, tp.rank * rows, tp, chunk_size)
    result.backward(grad.to(result.dtype))
    return result.detach(), hidden.grad, mine.grad


@pytest.mark.parametrize("chunk_size", [1, 7, 10, 30, 1000])
def test_equals_the_plain_loss(chunk_size):
    for ours, theirs in zip(run_ranks(1, _chunked, chunk_size)[0], plain()):
        torch.testing.assert_close(ours, theirs)


def test_equals_the_plain_loss_over_three_uneven_parts_of_the_vocabulary():
    expected = plain()
    results = run_ranks(3, _chunked, 7)
    assert [len(weight_grad) for *_, weight_grad in results] == [8, 8, 7]
    for log_probs, hidden_grad, _ in results:
        torch.testing.assert_close(log_probs, expected[0])
        torch.testing.assert_close(hidden_grad, expected[1])
    torch.testing.assert_close(torch.cat([weight_grad for *_, weight_grad in results]), expected[2])


def _weighted_sum(loss_weights, wrong=False):
    """The gradients of a sum weighted by a mask, made in the forward pass, and those of the general way."""
    results = []
    for known in (loss_weights, None):
        hidden, weight, targets, _ = tensors()
        tp = TensorParallel(dist.group.WORLD)
        log_probs = token_log_probs(hidden, weight, targets, 0, tp, 7, known)
        (-0.37 * (log_probs * (1 - loss_weights if wrong else loss_weights)).sum()).backward()
        results.append((log_probs.detach(), hidden.grad, weight.grad))
    return results


def test_gradients_made_in_the_forward_pass_equal_those_made_later():
    mask = (torch.rand(TOKENS, BATCH, generator=torch.Generator().manual_seed(1)) < 0.6).double()
    for loss_weights in (mask, torch.zeros_like(mask)):
        for ours, theirs in zip(*run_ranks(1, _weighted_sum, loss_weights)[0]):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(AssertionError, match="no weighted sum"):
        run_ranks(1, _weighted_sum, mask, True)


def test_bf16_inputs_give_float32_log_probabilities_that_sum_to_one():
    ours, *_ = run_ranks(1, _chunked, 7, torch.bfloat16)[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain(torch.bfloat16)[0], rtol=1e-5, atol=1e-5)


def _bf16_weight_gradient(known: bool) -> torch.Tensor:
    """All inputs 1, all logits 0, all targets 0: a token adds 15/16 to each element of row 0, -1/16 to the others. One token a chunk."""
    tokens, vocabulary = 512, 16
    hidden = torch.ones(tokens, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(vocabulary, 4, dtype=torch.bfloat16, requires_grad=True)
    targets, weights = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1) if known else None
    token_log_probs(hidden, weight, targets, 0, TensorParallel(dist.group.WORLD), 1, weights).sum().backward()
    return weight.grad


@pytest.mark.parametrize("known", [True, False])
def test_the_output_weights_gradient_is_summed_over_chunks_in_float32(known):
    """In bf16 the sum would stand still at 256, where 15/16 is less than half of its last digit."""
    (found,) = run_ranks(1, _bf16_weight_gradient, known)
    expected = torch.full((16, 4), -32.0, dtype=torch.bfloat16)
    expected[0] = 480.0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def _peak_megabytes(chunk_size: int | None, tokens: int, vocabulary: int, known: bool = False) -> float:
    """How far the process's resident memory rises in a forward and backward pass; `known`: the loss's weights are, as in pretraining."""
    tp = TensorParallel(dist.group.WORLD)
    hidden, weight = torch.randn(tokens, 1, 16, requires_grad=True), torch.randn(vocabulary, 16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens, 1))
    (hidden @ weight[:64].T).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if chunk_size is None:
        torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets.unsqueeze(-1)).sum().backward()
    else:
        token_log_probs(hidden, weight, targets, 0, tp, chunk_size, torch.ones(tokens, 1) if known else None).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_the_full_logits_are_never_held():
    tokens, vocabulary = 2048, 16_384
    full_logits = tokens * vocabulary * 4 / 2**20
    (plain_peak,) = run_ranks(1, _peak_megabytes, None, tokens, vocabulary)
    assert plain_peak > 2 * full_logits, "the plain loss holds logits, log-probabilities and gradients: the measure works"
    for known in (False, True):
        (chunked_peak,) = run_ranks(1, _peak_megabytes, 128, tokens, vocabulary, known)
        assert chunked_peak < full_logits / 2, f"{chunked_peak:.0f} MiB, the logits alone are {full_logits:.0f} MiB"
