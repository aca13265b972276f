"""Per-token log-probabilities over a vocabulary cut by TP, in chunks of tokens, so that neither the full logits nor their gradient is
ever held: with 128,256 columns they would be the largest tensors of the step. The backward pass makes each chunk's logits again."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_llama3.parallel.tensor_parallel import TensorParallel, local


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, tp: TensorParallel, chunk_size: int) -> Tensor:
    """log p(target) of each token, in at least float32.

    hidden [s, b, h] (this rank's part of s under sequence parallelism), weight [V/t, h] with rows `first_row` onward, targets int64
    [s, b] of the whole gathered s -> [s, b].
    """
    return _ChunkedLogProbs.apply(tp.gather_input(hidden), local(weight), targets, first_row, tp.group, chunk_size)


class _ChunkedLogProbs(Function):
    @staticmethod
    def forward(ctx, hidden, weight, all_targets, first_row, group, chunk_size):
        x, targets = hidden.flatten(0, 1), all_targets.flatten()
        dtype = torch.promote_types(x.dtype, torch.float32)
        result = x.new_empty(all_targets.shape, dtype=dtype)
        log_probs, log_sums = result.view(-1), x.new_empty(len(x), dtype=dtype)
        for rows in _chunks(len(x), chunk_size):
            logits = (x[rows] @ weight.T).to(dtype)
            peak = logits.amax(-1)
            if group.size() > 1:
                dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            logits -= peak.unsqueeze(-1)
            at_target = _at_target(logits, targets[rows] - first_row)
            sums = torch.stack([logits.exp_().sum(-1), at_target])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            log_sums[rows] = sums[0].log() + peak
            log_probs[rows] = sums[1] - sums[0].log()
        ctx.save_for_backward(x, weight, targets, log_sums)
        ctx.first_row, ctx.chunk_size, ctx.hidden_shape = first_row, chunk_size, hidden.shape
        return result

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets, log_sums = ctx.saved_tensors
        grad = grad.flatten()
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=log_sums.dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(x), ctx.chunk_size):
            probabilities = (x[rows] @ weight.T).to(log_sums.dtype).sub_(log_sums[rows].unsqueeze(-1)).exp_()
            # d log p(target) / d logits = onehot(target) - p
            logits_grad = probabilities.mul_(-grad[rows].unsqueeze(-1))
            _add_at_target(logits_grad, targets[rows] - ctx.first_row, grad[rows])
            logits_grad = logits_grad.to(x.dtype)
            if x_grad is not None:
                torch.mm(logits_grad, weight, out=x_grad[rows])
            if weight_grad is not None:
                weight_grad += logits_grad.T @ x[rows]
        x_grad = None if x_grad is None else x_grad.view(ctx.hidden_shape)
        return x_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _at_target(logits: Tensor, columns: Tensor) -> Tensor:
    """The logit of each row's target, 0 where another rank holds that column."""
    elsewhere = (columns < 0) | (columns >= logits.shape[1])
    found = logits.gather(1, columns.masked_fill(elsewhere, 0).unsqueeze(1)).squeeze(1)
    return found.masked_fill(elsewhere, 0)


def _add_at_target(logits: Tensor, columns: Tensor, values: Tensor) -> None:
    elsewhere = (columns < 0) | (columns >= logits.shape[1])
    columns = columns.masked_fill(elsewhere, 0).unsqueeze(1)
    logits.scatter_add_(1, columns, values.to(logits.dtype).masked_fill(elsewhere, 0).unsqueeze(1))
