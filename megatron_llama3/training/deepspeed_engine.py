"""The DeepSpeed engine: ZeRO-1 with TP and PP, ZeRO-2 and 3 with TP, optimizer states on the CPU on request.

DeepSpeed cuts optimizer states (and gradients, and weights), reduces gradients over DP x CP and runs Adam. The pipeline, the sums over TP
and the embedding group, and the global norm are the project's own, as in the FSDP2 engine.
"""

import logging
import math
import os
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import ParallelGroups
from megatron_llama3.training.deepspeed_parts import ModelParallelUnit, OwnedParts, deepspeed_settings
from megatron_llama3.training.engine import Engine, Trainable

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")  # a job of one process that no launcher started
import deepspeed

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # all-reduce through shared memory: not used here, and g++ takes a minute
warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's calls

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    def __init__(self, config: RunConfig, groups: ParallelGroups, trainable: Trainable = lambda name: True):
        super().__init__(config, groups, trainable)
        self.stage = config.parallel.zero_stage
        self.weights = dict(self.named_weights())
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}
        if not self.trained and self.stage > 1:
            raise UserError("--engine deepspeed: all weights are frozen, there is nothing to train")
        self.replicated = [n for n in self.trained if self.tp.size > 1 and self.weight(n).split_dim_at(self.tp.size) is None]
        # A pipeline rank whose layers are all frozen takes part in DeepSpeed's collectives with one number that stays 0.
        self.ballast = None if self.trained else nn.Parameter(torch.zeros(1, device=groups.device))
        # DeepSpeed would make master weights from weights it has rounded to bf16.
        masters = {n: p.detach().to("cpu", copy=True) for n, p in self.trained.items()} if config.optimizer.bf16 else {}
        self.deepspeed = self._initialize()
        self.parts = OwnedParts(self.deepspeed.optimizer, dist.get_rank(groups.dp_cp), self.stage)
        self.parts.make_adam_state()
        self.state_mesh = replace(groups, device=torch.device("cpu")).mesh()
        self._handed_out: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        if masters:
            self._write({f"model.{name}": master for name, master in masters.items()})

    # --- around backward passes ---

    def before_backward(self, chunk: int, reduces: bool, is_last: bool) -> None:
        """ZeRO-2 and 3 reduce after each backward pass (DeepSpeed's own hooks) and add up what they own; ZeRO-1 waits for the last."""
        if self.stage > 1:
            self.deepspeed.set_gradient_accumulation_boundary(is_last)

    def after_weight_half(self, chunk: int, reduces: bool, is_last: bool) -> None:
        """Nothing: ZeRO-1 looks at gradients when the schedule is done."""

    @torch.no_grad()
    def finish_gradients(self) -> None:
        if self.stage == 1:
            if self.ballast is not None:  # DeepSpeed reduces what has a gradient
                torch.autograd.backward(self.ballast, torch.zeros_like(self.ballast))
            self.deepspeed.allreduce_gradients()
        elif self.stage == 3:  # which knows only the mean over data-parallel ranks
            for gradient in self.owned_gradients().values():
                gradient.mul_(self.groups.dp_cp.size())
        # Summed after the reduction, on whole weights: parts differ from rank to rank, and the order of a sum shows in its last bits.
        self._sum_gradients({n: self.is_partial_over_tp(n) or self.tp.rank == 0 for n in self.replicated}, self.tp.group)
        self._sum_gradients(dict.fromkeys(filter(self.is_partial_over_ends, self.trained), True), self.groups.embedding)

    def _sum_gradients(self, adds: dict[str, bool], group: dist.ProcessGroup) -> None:
        """The sum of each gradient over the ranks of `group` that add to it, on each of them. All gradients travel in one buffer."""
        if not adds:
            return
        bucket = torch.zeros(sum(map(self._local_size, adds)), dtype=self.main_dtype, device=self.groups.device)
        wholes = dict(zip(adds, bucket.split([*map(self._local_size, adds)]), strict=True))
        places = {}
        for name, whole in wholes.items():
            start, part = self._owned(name, "gradient")
            places[name] = whole[start : start + part.numel()], part
            places[name][0].copy_(part)
        dist.all_reduce(bucket, group=self.groups.dp_cp)  # puts the data-parallel ranks' parts together
        # Copies that are equal up to rounding are taken from one rank: they must stay equal to the last bit.
        for name in adds:
            if not adds[name]:
                wholes[name].zero_()
        dist.all_reduce(bucket, group=group)
        for summed, part in places.values():
            part.copy_(summed)

    def _local_size(self, name: str) -> int:
        """Elements of this TP rank's shard of a weight."""
        return math.prod(self.weight(name).local_shape(self.tp.size, self.tp.rank))

    def owned_gradients(self) -> dict[str, Tensor]:
        return {name: self.parts.part(p, "gradient")[1] for name, p in self.trained.items()}

    def release_gathered_weights(self) -> None:
        self.parts.release_weights()

    # --- the verbs after it ---

    def optimizer_step(self, lr: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()

    def skip_step(self) -> None:
        """DeepSpeed's own step without Adam's: each stage then drops its gradients wherever it keeps them."""
        adam = self.deepspeed.optimizer.optimizer
        adam.step = lambda *args, **kwargs: None
        try:
            self.deepspeed.step()
        finally:
            del adam.step

    # --- checkpoint ---

    def state_tensors(self, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Copies on the CPU, gathered over data-parallel ranks (collective). The caller keeps them alive until `state_loaded`."""
        state = {}
        for name in self.weights:
            state[f"model.{name}"] = self._whole(name, "weight")
            if with_optimizer and name in self.trained:
                for moment in MOMENTS:
                    state[f"optimizer.{moment}.{name}"] = self._whole(name, moment)
        self._handed_out = WeakValueDictionary(state)
        return state

    def state_loaded(self, step: int, with_optimizer: bool = True) -> None:
        state = dict(self._handed_out)
        expected = [f"model.{n}" for n in self.weights]
        if with_optimizer:
            expected += [f"optimizer.{moment}.{n}" for n in self.trained for moment in MOMENTS]
            self.parts.set_adam_step(step)
        self._write({key: state[key].to_local() for key in expected})

    def gradient_of(self, name: str) -> Tensor | None:
        return self._whole(name, "gradient") if name in self.trained else None

    def _whole(self, name: str, kind: str) -> Tensor:
        """A DTensor of true global shape on the CPU."""
        spec = self.weight(name)
        dim = spec.split_dim_at(self.tp.size)
        return DTensor.from_local(
            self._put_together(name, kind).cpu().view(spec.local_shape(self.tp.size, self.tp.rank)),
            self.state_mesh,
            [Replicate(), Replicate() if dim is None else Shard(dim)],
            run_check=False,
            shape=torch.Size(spec.shape),
            stride=torch.empty(spec.shape, device="meta").stride(),
        )

    @torch.no_grad()
    def _put_together(self, name: str, kind: str) -> Tensor:
        """The data-parallel ranks' parts of this TP rank's shard, flat, in the main dtype (collective)."""
        start, part = self._owned(name, kind)
        shape = self.weight(name).local_shape(self.tp.size, self.tp.rank)
        # Each data-parallel rank fills its own range of zeros: their sum is the whole.
        flat = torch.zeros(math.prod(shape), dtype=self.main_dtype, device=self.groups.device)
        flat[start : start + part.numel()] = part
        if name in self.trained or self.stage == 3:
            dist.all_reduce(flat, group=self.groups.dp_cp)
        return flat

    @torch.no_grad()
    def _write(self, state: dict[str, Tensor]) -> None:
        """Takes this rank's parts out of its TP shards of weights ("model.*") and moments ("optimizer.*.*")."""
        self.parts.release_weights()
        for key, tensor in state.items():
            kind, name = ("weight", key.removeprefix("model.")) if key.startswith("model.") else key.split(".", 2)[1:]
            start, part = self._owned(name, kind)
            part.copy_(tensor.reshape(-1)[start : start + part.numel()])
        self.parts.update_model()

    def _owned(self, name: str, kind: str) -> tuple[int, Tensor]:
        # (where the part begins in the flattened weight, the part itself)
        return self.parts.part(self.trained[name], kind) if name in self.trained else self.parts.frozen_part(self.weights[name])

    # --- construction ---

    def _initialize(self) -> deepspeed.DeepSpeedEngine:
        for p in self.weights.values():
            p.tensor_model_parallel = True  # DeepSpeed's own norm, which nobody reads, fails where it finds nothing to count
        # The chunks of a pipeline rank are one model for DeepSpeed, but called one by one.
        whole = self.chunks[0] if self.stage > 1 else nn.ModuleDict({str(number): chunk for number, chunk in self.chunks.items()})
        if self.ballast is not None:
            whole.register_parameter("ballast", self.ballast)
        with redirect_stdout(StringIO()):  # memory reports
            engine, *_ = deepspeed.initialize(
                model=whole,
                optimizer=self._make_adam(),
                config=deepspeed_settings(self.config),
                mpu=ModelParallelUnit(self.groups),
                dist_init_required=False,
            )
        engine.set_gradient_accumulation_boundary(True)
        if self.stage > 1:
            self.chunks = {0: engine}
        return engine

    def _make_adam(self) -> torch.optim.Optimizer:
        o = self.config.optimizer
        groups = self._decay_groups(self.trained) if self.ballast is None else [{"params": [self.ballast], "weight_decay": 0.0}]
        betas = (o.adam_beta1, o.adam_beta2)
        if self.config.parallel.optimizer_cpu_offload:
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=o.lr, betas=betas, eps=o.adam_eps)
        return torch.optim.AdamW(groups, lr=o.lr, betas=betas, eps=o.adam_eps, fused=True)
