"""Per-token log-probabilities over a vocabulary cut by TP, in chunks of tokens, so that neither the full logits nor their gradient is
ever held: with 128,256 columns they would be the largest tensors of the step.

In general the backward pass makes each chunk's logits again. Where the loss is a weighted sum of the log-probabilities and the weights are
known beforehand, as in pretraining, the gradients are made in the forward pass while a chunk's logits are there.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_llama3.parallel.tensor_parallel import TensorParallel, local_part
from megatron_llama3.parallel.torch_private import assert_on_device


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    first_row: int,
    tp: TensorParallel,
    chunk_size: int,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """log p(target) of each token, in at least float32.

    hidden [s, b, h] (this rank's part of s under sequence parallelism), weight [V/t, h] with rows `first_row` onward, targets int64
    [s, b] of the whole gathered s -> [s, b]. With `loss_weights` [s, b] the gradient that comes back must be these times one number.
    """
    if not torch.is_grad_enabled():
        loss_weights = None  # an evaluation wants no gradients
    return _ChunkedLogProbs.apply(tp.gather_input(hidden), local_part(weight), targets, first_row, tp.group, chunk_size, loss_weights)


class _ChunkedLogProbs(Function):
    @staticmethod
    def forward(ctx, hidden, weight, all_targets, first_row, group, chunk_size, loss_weights):
        x, targets = hidden.flatten(0, 1), all_targets.flatten()
        dtype = torch.promote_types(x.dtype, torch.float32)
        result = x.new_empty(all_targets.shape, dtype=dtype)
        log_probs, log_sums = result.view(-1), x.new_empty(len(x), dtype=dtype)
        is_wanted = loss_weights is not None and any(ctx.needs_input_grad[:2])
        gradients = _Gradients(x, weight, dtype, *ctx.needs_input_grad[:2]) if is_wanted else None
        for rows in _chunks(len(x), chunk_size):
            logits = (x[rows] @ weight.T).to(dtype)  # [rows, V/t]
            peak = logits.amax(-1)  # over the whole vocabulary, so that exp cannot overflow on any rank
            if group.size() > 1:
                dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            logits -= peak.unsqueeze(-1)
            at_target = _at_target(logits, targets[rows] - first_row)
            sums = torch.stack([logits.exp_().sum(-1), at_target])  # both in one message; one rank holds the target, the others add 0
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            log_sums[rows] = sums[0].log() + peak
            log_probs[rows] = sums[1] - sums[0].log()
            if gradients is not None:
                gradients.add(rows, logits, sums[0], targets[rows] - first_row, loss_weights.flatten()[rows].to(dtype))
        ctx.hidden_shape, ctx.first_row, ctx.chunk_size = hidden.shape, first_row, chunk_size
        ctx.is_ready, ctx.weight_dtype = gradients is not None, weight.dtype
        if ctx.is_ready:
            weighted_token = loss_weights.flatten().argmax(0, keepdim=True)
            ctx.save_for_backward(gradients.x, gradients.weight, loss_weights, weighted_token)
        else:
            ctx.save_for_backward(x, weight, targets, log_sums)
        return result

    @staticmethod
    def backward(ctx, grad):
        if ctx.is_ready:
            x_grad, weight_grad, loss_weights, weighted_token = ctx.saved_tensors
            loss_weights = loss_weights.to(grad.dtype)
            # A tensor as an index would make the host wait for the GPU.
            token_grad, token_weight = (x.flatten().index_select(0, weighted_token) for x in (grad, loss_weights))
            scale = token_grad / token_weight.clamp_min(torch.finfo(grad.dtype).tiny)
            is_as_promised = torch.isclose(grad, scale * loss_weights).all()
            assert_on_device(is_as_promised, "the loss is no weighted sum by `loss_weights`")
            x_grad, weight_grad = (None if g is None else (g.to(scale.dtype) * scale).to(g.dtype) for g in (x_grad, weight_grad))
        else:
            x, weight, targets, log_sums = ctx.saved_tensors
            gradients = _Gradients(x, weight, log_sums.dtype, *ctx.needs_input_grad[:2])
            for rows in _chunks(len(x), ctx.chunk_size):
                probabilities = (x[rows] @ weight.T).to(log_sums.dtype).sub_(log_sums[rows].unsqueeze(-1)).exp_()
                gradients.add(rows, probabilities, None, targets[rows] - ctx.first_row, grad.flatten()[rows])
            x_grad, weight_grad = gradients.x, gradients.weight
        x_grad = None if x_grad is None else x_grad.view(ctx.hidden_shape)
        return x_grad, None if weight_grad is None else weight_grad.to(ctx.weight_dtype), None, None, None, None, None


class _Gradients:
    """The gradients of sum(weights * log p(target)), a chunk of tokens at a time; the output weight's is summed in `dtype`."""

    def __init__(self, x: Tensor, weight: Tensor, dtype: torch.dtype, needs_x: bool, needs_weight: bool):
        self.inputs, self.output_weight = x, weight
        self.x = torch.empty_like(x) if needs_x else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None

    def add(self, rows: slice, probabilities: Tensor, sums: Tensor | None, columns: Tensor, weights: Tensor) -> None:
        """Uses up `probabilities`, [rows, V/t], which are still to be divided by `sums` [rows] where those are given."""
        # d log p(target) / d logits = onehot(target) - p
        logits_grad = probabilities.mul_((-weights if sums is None else -weights / sums).unsqueeze(-1))
        _add_at_target(logits_grad, columns, weights)
        logits_grad = logits_grad.to(self.inputs.dtype)
        if self.x is not None:
            torch.mm(logits_grad, self.output_weight, out=self.x[rows])
        if self.weight is None:
            return
        if self.weight.dtype == logits_grad.dtype:
            self.weight.addmm_(logits_grad.T, self.inputs[rows])
        else:
            self.weight += logits_grad.T @ self.inputs[rows]


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
