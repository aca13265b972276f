"""Faults planted on purpose, to see that the comparison of a layout with one process would catch them.

Each is a patch of the running code that a test plants in forked ranks (`train_under(..., before=fault.plant)`): the product has no
switch for any of them. It is never taken out again, so plant it in a process that ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from megatron_llama3.config.run import RunConfig
from megatron_llama3.model import llama, rope
from megatron_llama3.model.sharding import PartialOver, WeightSpec
from megatron_llama3.parallel import collectives, tensor_parallel
from megatron_llama3.parallel.context_parallel import local_positions
from megatron_llama3.parallel.pipeline_parallel import PipelineExecutor
from megatron_llama3.training import engine, microbatch
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.fsdp2_engine import Fsdp2Engine


@dataclass(frozen=True)
class Fault:
    plant: Callable[[], None]
    has_axis: Callable[[RunConfig], bool]
    """Whether a run has what the fault breaks; in any other run it must change nothing."""


def patch(owner: object, name: str, around: Callable) -> None:
    """Replaces `owner.name` by `around(original, *args)`."""
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(lambda *args, **kwargs: around(original, *args, **kwargs)))


# --- tensor and sequence parallelism ---


def _drop_forward_all_reduce() -> None:
    patch(tensor_parallel, "reduce_from_group", lambda original, x, group: x)


def _drop_backward_all_reduce() -> None:
    collectives._CopyToGroup.backward = staticmethod(lambda ctx, grad: (grad, None))
    patch(tensor_parallel, "start_all_reduce", lambda original, x, group: lambda: x)


def _return_non_contiguous_input_unreduced() -> None:
    """What is summed is a contiguous copy, and what comes back is the input, which arrives here as a batch-first layer would leave it."""

    def unreduced(original, x: Tensor, group) -> Tensor:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return original(x, group) if x.is_contiguous() else x.contiguous()

    patch(collectives, "all_reduce", unreduced)


def _leave_gradients_unsummed(over: PartialOver) -> None:
    patch(WeightSpec, "gradient_is_partial", lambda original, spec, *args: spec.partial_over is not over and original(spec, *args))


def _leave_norm_gradients_unsummed() -> None:
    _leave_gradients_unsummed(PartialOver.SEQUENCE)


def _leave_replicated_kv_gradients_unsummed() -> None:
    _leave_gradients_unsummed(PartialOver.HEADS)


def _count_replicas_in_norm() -> None:
    def counts(original, self: Engine, name: str) -> bool:
        return original(self, name) or (self.tp.rank > 0 and self.weight(name).split_dim_at(self.tp.size) is None)

    patch(Engine, "counts_in_norm", counts)


def _leave_padded_column_in_softmax() -> None:
    def padded(original, hidden, weight, targets, first_row, tp, *rest) -> Tensor:
        weight = tensor_parallel.local_part(weight)
        rows = torch.tensor(weight.shape[0])
        torch.distributed.all_reduce(rows, torch.distributed.ReduceOp.MAX, group=tp.group)
        return original(hidden, F.pad(weight, (0, 0, 0, int(rows) - weight.shape[0])), targets, first_row, tp, *rest)

    patch(llama, "token_log_probs", padded)


# --- context parallelism ---


def _patch_microbatches(change: Callable[[Engine, list], list]) -> None:
    def make(original, batch, groups, *args):
        return change(batch, groups, original(batch, groups, *args))

    patch(engine, "make_microbatches", make)


def _shift_mask_across_chunk() -> None:
    def shifted(original, seq_length: int, cp_size: int, cp_rank: int) -> list[tuple[int, int]]:
        first, *rest = original(seq_length, cp_size, cp_rank)
        return [first, *((start - 1, end - 1) for start, end in rest)]

    patch(microbatch, "chunk_ranges", shifted)


def _leave_rope_unpermuted() -> None:
    """Positions as if the sequence were cut into CP pieces in order."""

    def unpermuted(batch, groups, made: list) -> list:
        if groups.topology.cp > 1:
            for m in made:
                length = len(m.inputs.position_ids)
                m.inputs.position_ids = torch.arange(groups.at.cp * length, (groups.at.cp + 1) * length).unsqueeze(1)
        return made

    _patch_microbatches(unpermuted)


def _normalise_per_cp_shard() -> None:
    def count(original, self: Engine, batch, objective) -> int:
        cp, mine = self.groups.topology.cp, local_positions(batch.tokens.shape[-1], self.groups.topology.cp, self.groups.at.cp)
        return original(self, batch._replace(loss_mask=batch.loss_mask[..., mine.numpy()]), objective) * cp

    patch(Engine, "_global_count", count)


def _lose_last_token_of_cp_shard() -> None:
    """As if labels were made by shifting each rank's own tokens: the last has no successor there."""

    def lost(batch, groups, made: list) -> list:
        if groups.topology.cp > 1:
            for m in made:
                m.loss_mask[-1] = False
        return made

    _patch_microbatches(lost)


# --- the mean over tokens ---


def _normalise_per_microbatch() -> None:
    """On each rank the mean of its micro-batches' own means, in place of the mean over their tokens."""

    def normalised(batch, groups, made: list) -> list:
        counts = [max(1, int(mask.sum())) for mask in batch.loss_mask]
        if len(made) == 1:
            return made
        return [m._replace(loss_mask=m.loss_mask * (float(batch.loss_mask.sum()) / (len(made) * c))) for m, c in zip(made, counts)]

    _patch_microbatches(normalised)


def _normalise_per_rank() -> None:
    """The mean over data-parallel ranks of each rank's own mean."""

    def count(original, self: Engine, batch, objective) -> int:
        original(self, batch, objective)
        return max(1, objective.count(batch)) * self.groups.topology.dp

    patch(Engine, "_global_count", count)


# --- the rest ---


def _leave_one_tied_copy_unsynced() -> None:
    def unsynced(original, self: Fsdp2Engine, names: list[str], group) -> None:
        kept = {n: tensor_parallel.local_part(self.parameters[n].grad).clone() for n in names}
        original(self, names, group)
        if self.groups.is_last_stage and group is self.groups.embedding:
            for name, gradient in kept.items():
                tensor_parallel.local_part(self.parameters[name].grad).copy_(gradient)

    patch(Fsdp2Engine, "_all_reduce_gradients", unsynced)


def _ignore_rope_scaling() -> None:
    patch(rope, "_scale_frequencies", lambda original, frequencies, config: frequencies)


def _accumulate_in_bf16() -> None:
    """A gradient that waits for more to be added to it is kept in bf16."""

    def backward(original, self: PipelineExecutor, action) -> None:
        for p in _accumulators(self.chunks[action.chunk]):
            if p.grad is not None:
                p.grad = p.grad.bfloat16().to(p.dtype)
        original(self, action)

    around = wraps(PipelineExecutor._backward)(lambda *args, original=PipelineExecutor._backward: backward(original, *args))
    PipelineExecutor._COMMANDS = PipelineExecutor._COMMANDS | {"B": around}


def _accumulators(chunk: torch.nn.Module) -> list[Tensor]:
    """The tensors in whose `grad` a chunk's micro-batches add up: FSDP2's gathered weights, or the weights themselves."""
    modules = [m for m in chunk.modules() if isinstance(m, FSDPModule)]
    if not modules:
        return list(chunk.parameters())
    groups = [fully_shard.state(m)._fsdp_param_group for m in modules]
    return [p._unsharded_param for g in groups if g for p in g.fsdp_params if hasattr(p, "_unsharded_param")]


def _keep_stale_weights() -> None:
    """The optimizer updates the master weights, and what is gathered from them stays what it was at first."""

    first_inputs = {}

    def stale(self: FSDPParam, original=FSDPParam.all_gather_inputs.fget) -> list[Tensor]:
        if self not in first_inputs:
            first_inputs[self] = [t.clone() for t in original(self)]
        return first_inputs[self]

    FSDPParam.all_gather_inputs = property(stale)


def _microbatches(config: RunConfig) -> int:
    return config.training.global_batch_size // (config.training.micro_batch_size * config.parallel.data_parallel_size)


def _tp(config: RunConfig) -> int:
    return config.parallel.tensor_model_parallel_size


def _cp(config: RunConfig) -> int:
    return config.parallel.context_parallel_size


FAULTS: dict[str, Fault] = {
    "forward all-reduce dropped": Fault(_drop_forward_all_reduce, lambda c: _tp(c) > 1 and not c.parallel.sequence_parallel),
    "backward all-reduce dropped": Fault(_drop_backward_all_reduce, lambda c: _tp(c) > 1 and not c.parallel.sequence_parallel),
    "all-reduce returns a non-contiguous input unreduced": Fault(
        _return_non_contiguous_input_unreduced,
        lambda c: _tp(c) > 1 and not c.parallel.sequence_parallel and c.training.micro_batch_size > 1,
    ),
    "norm gradients unsummed": Fault(_leave_norm_gradients_unsummed, lambda c: c.parallel.sequence_parallel),
    "replicated KV gradients unsummed": Fault(_leave_replicated_kv_gradients_unsummed, lambda c: _tp(c) > c.model.num_query_groups),
    "replicated weights counted TP times in the norm": Fault(_count_replicas_in_norm, lambda c: _tp(c) > 1),
    "padded vocabulary column in the softmax": Fault(_leave_padded_column_in_softmax, lambda c: c.model.vocab_size % _tp(c) > 0),
    "mask shifted across a CP chunk": Fault(_shift_mask_across_chunk, lambda c: _cp(c) > 1),
    "RoPE positions unpermuted": Fault(_leave_rope_unpermuted, lambda c: _cp(c) > 1),
    "gradient normalised per CP shard": Fault(_normalise_per_cp_shard, lambda c: _cp(c) > 1),
    "shifted labels lose a CP shard's last token": Fault(_lose_last_token_of_cp_shard, lambda c: _cp(c) > 1),
    "token mean per micro-batch": Fault(_normalise_per_microbatch, lambda c: _microbatches(c) > 1),
    "token mean per rank": Fault(_normalise_per_rank, lambda c: c.parallel.data_parallel_size > 1),
    "one tied copy unsynced": Fault(
        _leave_one_tied_copy_unsynced,
        lambda c: not c.model.untie_embeddings_and_output_weights and c.parallel.pipeline_model_parallel_size > 1,
    ),
    "RoPE scaling ignored": Fault(_ignore_rope_scaling, lambda c: c.model.use_rope_scaling),
    "accumulation in bf16": Fault(_accumulate_in_bf16, lambda c: _microbatches(c) > 1),
    "stale master weights": Fault(_keep_stale_weights, lambda c: _cp(c) * c.parallel.data_parallel_size > 1),
}
