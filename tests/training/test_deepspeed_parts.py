"""What the DeepSpeed engine starts DeepSpeed's optimizers with."""

from types import SimpleNamespace

import pytest
import torch

from megatron_llama3.config.run import RunConfig
from megatron_llama3.training.deepspeed_parts import ModelParallelUnit, OwnedParts, deepspeed_settings


class CPUAdam:
    """As DeepSpeedCPUAdam, whose step is a plain number that it counts up before it is used."""

    def __init__(self):
        self.state = {}


def made_by(adam, stage: int) -> tuple[OwnedParts, dict, list[str]]:
    master = torch.arange(6.0)
    called = []
    fields = {"optimizer": adam, "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups": [master]}
    parts = OwnedParts(SimpleNamespace(**fields, _lazy_init_hp_params_optimizer_state=lambda: called.append("linked")), 0, stage)
    parts.make_adam_state()
    return parts, adam.state[master], called


@pytest.mark.parametrize("stage, called", [(1, ["linked"]), (2, ["linked"]), (3, [])])
@pytest.mark.parametrize("adam", ["torch", "offload"])
def test_adam_starts_at_step_0_with_zero_moments(stage, called, adam):
    _, state, found = made_by(torch.optim.AdamW([torch.ones(1)]) if adam == "torch" else CPUAdam(), stage)
    assert state["step"] == 0
    assert isinstance(state["step"], torch.Tensor) == (adam == "torch")
    for moment in (state["exp_avg"], state["exp_avg_sq"]):
        torch.testing.assert_close(moment, torch.zeros(6))
    assert state["exp_avg"].data_ptr() != state["exp_avg_sq"].data_ptr()
    assert found == called


@pytest.mark.parametrize("adam", ["torch", "offload"])
def test_a_loaded_step_is_set_in_the_kind_that_adam_has(adam):
    parts, state, _ = made_by(torch.optim.AdamW([torch.ones(1)]) if adam == "torch" else CPUAdam(), 2)
    parts.set_adam_step(12)
    assert state["step"] == 12
    assert isinstance(state["step"], torch.Tensor) == (adam == "torch")


def settings(stage: int, bf16: bool = False, offload: bool = False) -> dict:
    config = RunConfig()
    config.training.micro_batch_size = 3
    config.parallel.zero_stage, config.parallel.optimizer_cpu_offload, config.optimizer.bf16 = stage, offload, bf16
    return deepspeed_settings(config)


def test_deepspeed_neither_clips_nor_averages_nor_accumulates():
    for stage in (1, 2, 3):
        found = settings(stage)
        assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"], found["gradient_clipping"]) == (3, 1, 0.0)
        assert (found["communication_data_type"], found["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})
        assert found.get("gradient_allreduce_op") == (None if stage == 3 else "sum")
        assert (found["zero_optimization"]["stage"], found["zero_optimization"]["overlap_comm"]) == (stage, False)


@pytest.mark.parametrize("stage, bf16, offload, off", [
    (1, False, False, True), (1, True, False, False), (2, False, False, True), (2, True, False, True), (3, False, False, False),
    (1, False, True, False), (2, True, True, False),
])  # fmt: skip
def test_its_own_gradient_norm_is_off_where_that_can_be_told(stage, bf16, offload, off):
    found = settings(stage, bf16, offload)
    assert found["zero_optimization"].get("compute_grad_norm", True) != off
    assert found.get("bf16") == ({"enabled": True, "immediate_grad_update": True} if bf16 else None)
    on_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    assert found["zero_optimization"].get("offload_optimizer") == (on_cpu if offload else None)


def test_groups_in_deepspeeds_words(monkeypatch):
    from megatron_llama3.training import deepspeed_parts

    ranks = SimpleNamespace(get_rank=lambda group: f"rank in {group}", get_world_size=lambda group: f"size of {group}")
    monkeypatch.setattr(deepspeed_parts, "dist", ranks)
    state = SimpleNamespace(get_model_parallel_group=lambda: "TP x PP")
    monkeypatch.setattr(deepspeed_parts, "megatron_parallel_state", lambda: state)
    unit = ModelParallelUnit(SimpleNamespace(tp="TP", pp="PP", dp_cp="DP x CP"))
    for kind, group in (("tensor_model", "TP"), ("pipeline_model", "PP"), ("model", "TP x PP"), ("data", "DP x CP")):
        assert getattr(unit, f"get_{kind}_parallel_group")() == group
        assert getattr(unit, f"get_{kind}_parallel_rank")() == f"rank in {group}"
        assert getattr(unit, f"get_{kind}_parallel_world_size")() == f"size of {group}"
    with pytest.raises(AttributeError):
        unit.get_expert_parallel_group  # noqa: B018
