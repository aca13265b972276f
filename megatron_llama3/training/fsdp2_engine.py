"""The default engine: FSDP2 over the DP x CP group. Weights stay gathered from the first forward to the last backward of a step, as in
the paper (section 3.3.2); weights are gathered in the compute dtype, gradients accumulate and reduce in the main dtype, master weights
and Adam's moments are sharded.

A group of one whose compute and main dtype agree needs none of it and runs on plain tensors.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_llama3.config.run import RunConfig
from megatron_llama3.model.llama import Llama
from megatron_llama3.parallel.groups import ParallelGroups
from megatron_llama3.parallel.tensor_parallel import local_part
from megatron_llama3.parallel.torch_private import finish_backward, flatten, unflatten
from megatron_llama3.training.engine import Engine, Trainable


class Fsdp2Engine(Engine):
    def __init__(self, config: RunConfig, groups: ParallelGroups, trainable: Trainable = lambda name: True):
        super().__init__(config, groups, trainable)
        self.mesh = groups.mesh()
        self.is_sharded = groups.dp_cp.size() > 1 or self.compute_dtype != self.main_dtype
        for chunk in self.chunks.values():
            self._distribute(chunk)
            if self.is_sharded:
                self._shard(chunk)
        self.parameters = {name: p for name, p in self.named_weights() if p.requires_grad}
        # What Adam runs on: this rank's shard of each master weight, as a plain tensor on the same storage.
        self.locals = {name: local_part(p.detach()) for name, p in self.parameters.items()}
        self.optimizer = self._make_optimizer()

    # --- around the passes of a chunk ---

    def gather_ahead(self, chunk: int) -> None:
        for module in self.chunks[chunk].modules():
            if isinstance(module, FSDPModule):
                module.unshard(async_op=True)

    def before_backward(self, chunk: int, reduces: bool, is_last: bool) -> None:
        """Whole gradients stay on this rank until they are reduced and added, in the main dtype, to this rank's parts of them; weights
        stay gathered until the chunk's last backward."""
        module = self.chunks[chunk]
        if isinstance(module, FSDPModule):
            module.set_is_last_backward(reduces)  # the reduction's buffers are freed after it
            module.set_requires_gradient_sync(reduces)
            module.set_reshard_after_backward(is_last)

    def after_weight_half(self, chunk: int, reduces: bool, is_last: bool) -> None:
        """FSDP's own hooks have run with the input half, before these gradients existed: accumulate them in the main dtype, and reduce
        where a group of micro-batches ends."""
        module = self.chunks[chunk]
        if not isinstance(module, FSDPModule):
            return
        # With one micro-batch nothing has been accumulated before the last half, and FSDP would reduce its bf16 beside others' float32.
        for reduce in (False, True) if reduces else (False,):
            self.before_backward(chunk, reduce, reduce and is_last)
            finish_backward(module)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        self._all_reduce_gradients(list(filter(self.is_partial_over_tp, self.parameters)), self.tp.group)
        self._all_reduce_gradients(list(filter(self.is_partial_over_ends, self.parameters)), self.groups.embedding)

    def owned_gradients(self) -> dict[str, Tensor]:
        return {name: local_part(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def release_gathered_weights(self) -> None:
        for chunk in self.chunks.values():
            for module in chunk.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    # --- the verbs after it ---

    @torch.no_grad()
    def optimizer_step(self, lr: float) -> None:
        if self.optimizer is None:
            return
        # FSDP leaves gradients on its DTensor parameters; the optimizer wants them on the shards it was given.
        for name, gradient in self.owned_gradients().items():
            self.locals[name].grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.skip_step()

    def skip_step(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self.locals[name].grad = None

    # --- checkpoint ---

    def state_tensors(self, with_optimizer: bool = True) -> dict[str, Tensor]:
        state = {}
        for name, parameter in self.named_weights():
            state[f"model.{name}"] = parameter.detach()
            if with_optimizer and name in self.parameters:
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[f"optimizer.{moment}.{name}"] = _like(parameter, self.optimizer.state[self.locals[name]][moment])
        return state

    def state_loaded(self, step: int, with_optimizer: bool = True) -> None:
        if with_optimizer and self.optimizer is not None:
            for state in self.optimizer.state.values():
                state["step"].fill_(step)

    # --- construction ---

    def _distribute(self, chunk: Llama) -> None:
        """Turns each weight into a DTensor on the TP mesh that says which part of the whole it is."""
        if self.tp.size == 1:
            return
        replaced = {}
        for module in chunk.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in replaced:
                    name = next(n for n, p in chunk.named_weights() if p is parameter)
                    replaced[parameter] = self._as_dtensor(name, parameter)
                setattr(module, key, replaced[parameter])

    def _as_dtensor(self, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        spec = self.weight(name)
        dim = spec.split_dim_at(self.tp.size)
        stride = torch.empty(spec.shape, device="meta").stride()
        placement = [Replicate() if dim is None else Shard(dim)]
        shape = torch.Size(spec.shape)
        tensor = DTensor.from_local(parameter.data, self.mesh["tp"], placement, run_check=False, shape=shape, stride=stride)
        return torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)

    def _shard(self, chunk: Llama) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype,
            reduce_dtype=self.main_dtype,
            cast_forward_inputs=False,  # the rotary tables stay in float32
        )
        for module in [*chunk.layers.values(), chunk]:
            fully_shard(module, mesh=self.mesh["dp_cp"], reshard_after_forward=False, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)  # gradients are summed: the loss is divided by the global token count already
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    def _make_optimizer(self) -> torch.optim.AdamW | None:
        """None where every weight of this rank is frozen: torch refuses an optimizer of nothing."""
        if not self.locals:
            return None
        o = self.config.optimizer
        betas = (o.adam_beta1, o.adam_beta2)
        optimizer = torch.optim.AdamW(self._decay_groups(self.locals), lr=o.lr, betas=betas, eps=o.adam_eps, fused=True)
        # Moments are there before the first step, which would make them: a checkpoint is loaded into them.
        for tensor in self.locals.values():
            optimizer.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        return optimizer

    def _all_reduce_gradients(self, names: list[str], group: dist.ProcessGroup | None) -> None:
        gradients = [local_part(self.parameters[n].grad) for n in names if self.parameters[n].grad is not None]
        gradients = [g for g in gradients if g.numel()]
        if not gradients or group.size() == 1:
            return
        flat = flatten(gradients)
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(gradients, unflatten(flat, gradients)):
            gradient.copy_(summed)


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` as the same part of a whole as `parameter`."""
    if not isinstance(parameter, DTensor):
        return tensor
    return DTensor.from_local(
        tensor, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
