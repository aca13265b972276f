"""A step with a bad loss or gradient leaves no trace but in the data position, under every engine."""

import math

import pytest
import torch

from megatron_llama3.config.run import RunConfig, TrainingConfig
from megatron_llama3.data.loader import build_train_and_valid_streams
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.tensor_parallel import local_part
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.training import engine as engine_module
from megatron_llama3.training.bad_steps import ENOUGH, WINDOW, note_step, reason_to_skip
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.objectives import NextToken
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import train_step
from tests.training.test_resume import data, run_config  # noqa: F401  a fixture

STEPS, BAD = 6, 4
LAYOUTS = {
    "one": {},
    "tp2_pp2": {"world_size": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "dp2": {"world_size": 2},
    "zero1_pp2": {"world_size": 2, "engine": "deepspeed", "pipeline_model_parallel_size": 2},
    "zero2": {"world_size": 2, "engine": "deepspeed", "zero_stage": 2},
    "zero3": {"world_size": 2, "engine": "deepspeed", "zero_stage": 3},
}


def test_what_is_a_bad_step():
    plain, spiky = TrainingConfig(), TrainingConfig(check_for_spiky_loss=True, spiky_loss_factor=3.0)
    state = TrainState(recent_losses=[2.0] * (ENOUGH - 1))
    assert "no target" in reason_to_skip({"loss": math.nan, "count": 0}, math.nan, state, plain)
    assert reason_to_skip({"loss": math.nan, "count": 9}, 1.0, state, plain) == "the loss is nan"
    assert reason_to_skip({"loss": 2.0, "count": 9}, math.inf, state, plain) == "the gradient norm is inf"
    assert reason_to_skip({"loss": 7.0, "count": 9}, 1.0, state, spiky) is None  # too few to compare with
    note_step(state, 100.0, False, spiky)  # one outlier does not move the median
    assert reason_to_skip({"loss": 7.0, "count": 9}, 1.0, state, spiky) == "the loss 7.0000 is above 3 x 2.0000, the median of recent ones"
    assert reason_to_skip({"loss": 5.9, "count": 9}, 1.0, state, spiky) is None
    assert reason_to_skip({"loss": 7.0, "count": 9}, 1.0, state, plain) is None


def test_what_a_checkpoint_keeps_of_it():
    config, state = TrainingConfig(check_for_spiky_loss=True), TrainState()
    for loss, skipped in [(3.0, False), (9.0, True), (9.0, True), (2.0, False), (9.0, True)]:
        note_step(state, loss, skipped, config)
    assert (state.iteration, state.updates, state.skipped_in_a_row, state.recent_losses) == (5, 2, 1, [3.0, 2.0])
    for _ in range(2 * WINDOW):
        note_step(state, 1.0, False, config)
    assert len(state.recent_losses) == WINDOW
    older = TrainState.from_saved({"iteration": 7, "consumed_samples": 8, "consumed_tokens": 9, "data": {}})
    assert (older.iteration, older.updates) == (7, 7)


def poison(kind: str, calls: list) -> None:
    """Makes the loss of the BAD-th batch, and its gradients, overflow or a hundred times too large."""
    make = engine_module.make_microbatches

    def poisoned(*args):
        calls.append(1)
        factor = 1.0 if len(calls) != BAD else 3e38 if kind == "overflow" else 100.0
        return [m._replace(loss_mask=m.loss_mask * factor) for m in make(*args)]

    engine_module.make_microbatches = poisoned


def two_runs(config: RunConfig, kind: str) -> tuple[list, list, list]:
    """A run whose BAD-th batch is bad, and one that never sees it: why steps were skipped, and (loss, learning rate) of the
    others in both. All state is equal at the end."""
    groups, calls = initialize_groups(config.parallel), []
    poison(kind, calls)
    runs = []
    for is_bad in (True, False):
        calls[:] = [] if is_bad else [0] * STEPS
        stream, _ = build_train_and_valid_streams(config)
        engine, state, results = build_engine(config, groups), TrainState(recent_losses=[4.6] * ENOUGH), []
        for step in range(1, STEPS + 1):
            if step == BAD and not is_bad:
                stream.plan_batch(4, 12)
            else:
                results.append(train_step(engine, stream, state, config, NextToken()))
        tensors = {key: local_part(tensor).clone() for key, tensor in engine.state_tensors().items()}
        runs.append(([r.skipped for r in results], [(r.loss, r.lr) for r in results if not r.skipped], tensors))
    (skipped, bad, first), (_, good, second) = runs
    assert all(torch.equal(first[key], second[key]) for key in second)
    return skipped, bad, good


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["overflow", "spike"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_step_leaves_no_trace(data, tmp_path, layout, kind):  # noqa: F811
    if "zero" in layout:
        pytest.importorskip("megatron_llama3.training.deepspeed_engine")
    config = run_config(data, tmp_path, **LAYOUTS[layout])
    config.data.seq_length_schedule, config.data.seq_length = None, 12
    config.training.step_batch_size_schedule, config.training.global_batch_size = None, 4
    config.training.check_for_spiky_loss = True
    for skipped, bad, good in run_ranks(config.parallel.world_size, two_runs, config, kind):
        assert [reason is not None for reason in skipped] == [step == BAD for step in range(1, STEPS + 1)]
        assert ("inf" if kind == "overflow" else "above 2 x") in skipped[BAD - 1]
        assert bad == good
