"""What the DeepSpeed engine needs to know of DeepSpeed's insides: its settings, the groups it asks for, and which part of each weight this
data-parallel rank owns.

DeepSpeed has three optimizers here (ZeRO-1/2, its bf16 form, ZeRO-3). Each cuts the master weights, the reduced gradients and Adam's
moments of a weight, laid out flat, into one range a data-parallel rank; `OwnedParts` gives these ranges as views that can be written.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import ParallelGroups, megatron_parallel_state

BUCKET_ELEMENTS = 50_000_000


class ModelParallelUnit:
    """The groups in DeepSpeed's words (its `mpu`). Data parallel is DP x CP; model parallel, all ranks that share a step, is TP x PP."""

    def __init__(self, groups: ParallelGroups):
        model_parallel = megatron_parallel_state().get_model_parallel_group()
        self._groups = {"tensor_model": groups.tp, "pipeline_model": groups.pp, "model": model_parallel, "data": groups.dp_cp}

    def __getattr__(self, name: str):
        """get_{tensor_model,pipeline_model,model,data}_parallel_{group,rank,world_size}"""
        for kind, group in self.__dict__["_groups"].items():
            answers = {"group": lambda g: g, "rank": dist.get_rank, "world_size": dist.get_world_size}
            for what, answer in answers.items():
                if name == f"get_{kind}_parallel_{what}":
                    return lambda: answer(group)
        raise AttributeError(name)


def deepspeed_settings(config: RunConfig) -> dict:
    """DeepSpeed's JSON config. Gradients add up and travel in float32; the engine clips, not DeepSpeed."""
    stage, offload = config.parallel.zero_stage, config.parallel.optimizer_cpu_offload
    zero = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif stage == 2 or (stage == 1 and not config.optimizer.bf16):
        zero["compute_grad_norm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the loss is divided by the token count of all micro-batches already
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
    if config.optimizer.bf16:
        # Without immediate_grad_update a backward pass that DeepSpeed did not start raises.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if stage < 3:
        settings["gradient_allreduce_op"] = "sum"
    return settings


class OwnedParts:
    """This data-parallel rank's flat range of each trainable weight. `kind` is "weight", "gradient", "exp_avg" or "exp_avg_sq"."""

    def __init__(self, optimizer, dp_rank: int, stage: int):
        self.optimizer, self.dp_rank, self.stage = optimizer, dp_rank, stage
        names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
        self.masters: list[Tensor] = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))

    def part(self, p: nn.Parameter, kind: str) -> tuple[int, Tensor]:
        """(where the range starts in the flattened weight, the range as a flat float32 view; empty if other ranks own all of it)"""
        return self._part_zero3(p, kind) if self.stage == 3 else self._part(p, kind)

    def _part(self, p: nn.Parameter, kind: str) -> tuple[int, Tensor]:
        owned = p._hp_mapping
        if owned is None:
            return 0, self.masters[0].new_empty(0)
        start, length = owned.lp_fragment_address.start, owned.lp_fragment_address.numel
        if kind == "gradient":
            gradient = owned.get_lp_grad_fragment(p._index_in_param_group).view(-1)
            # The bf16 optimizer keeps whole gradients.
            return start, gradient if gradient.numel() == length else gradient[start : start + length]
        return start, owned.get_hp_fragment(None if kind == "weight" else kind).detach()

    def _part_zero3(self, p: nn.Parameter, kind: str) -> tuple[int, Tensor]:
        group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
        master = self.masters[group]
        if kind == "gradient":
            flat = master.grad[offset:] if self.optimizer.offload_optimizer else self.optimizer.get_local_fp32_grad_for_param(p)
        else:
            flat = (master if kind == "weight" else self.optimizer.optimizer.state[master][kind]).detach()[offset:]
        start = min(self.dp_rank * length, p.ds_numel)
        return start, flat[: min(length, p.ds_numel - start)]  # the last rank's range is padded

    def frozen_part(self, p: nn.Parameter) -> tuple[int, Tensor]:
        """The range of a frozen weight itself, in the compute dtype: the whole of it where weights are not cut."""
        if self.stage < 3:
            return 0, p.detach().view(-1)
        start = min(self.dp_rank * p.ds_tensor.numel(), p.ds_numel)
        return start, p.ds_tensor.detach()[: p.ds_numel - start]

    def make_adam_state(self) -> None:
        """Zero moments from the start: DeepSpeed would make them in the first step, after a checkpoint may have been loaded."""
        adam = self.optimizer.optimizer
        for master in self.masters:
            step = torch.zeros((), device=master.device) if isinstance(adam, torch.optim.AdamW) else 0
            adam.state[master] = {"step": step, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def set_adam_step(self, step: int) -> None:
        for state in self.optimizer.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step) if isinstance(state["step"], Tensor) else step

    def release_weights(self) -> None:
        """ZeRO-3: no weight stays gathered."""
        if self.stage == 3:
            self.optimizer._partition_all_parameters()

    def update_model(self) -> None:
        """The model's own weights from master weights that were written into."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        for group in range(len(self.masters)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.optimizer._post_step(timer_names=set())  # gathers the small weights that stay gathered
