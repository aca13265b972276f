"""The planner's timeline against the project's own step, run under fake tensors at the widths of 405B."""

import runpy
from pathlib import Path

import pytest

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import phases
from megatron_llama3.planning.dry_run import MeasuredStep, measure_rank, rank_of_stage
from megatron_llama3.planning.fit import GIB, spare_bytes
from megatron_llama3.planning.local_ranks import FORK
from megatron_llama3.planning.memory import Peak, peaks

TABLE_4 = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/step_memory.py"))
SMALL = (
    "--dry-run --model-name llama3-405b --num-layers 6 --tensor-model-parallel-size 8 --sequence-parallel --bf16 --seq-length 8192 "
    "--pipeline-model-parallel-size 2 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split "
    "--num-virtual-stages-per-pipeline-rank 2 --world-size 64 --global-batch-size 16"
)


def measured(config: RunConfig, stage: int) -> MeasuredStep:
    """In a process of its own: process groups are global."""
    with FORK.Pool(1) as process:
        return process.apply(measure_rank, (config, phases(config)[-1], rank_of_stage(config, stage)))


def planned_and_measured(flags: str, stage: int | None = None) -> tuple[RunConfig, Peak, MeasuredStep]:
    config = parse_run_config(flags.split())
    every = peaks(config, phases(config)[-1])
    planned = max(every, key=lambda peak: peak.total) if stage is None else every[stage]
    return config, planned, measured(config, planned.stage)


def test_a_small_step():
    _, planned, step = planned_and_measured(SMALL)
    assert step.peak == pytest.approx(planned.total, rel=0.02)
    assert step.actions[0].before < step.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--recompute-granularity selective --recompute-modules layernorm mlp",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "--pipeline-schedule zero-bubble",
        "--context-parallel-size 2",
        "--reduce-gradients-every 2",
        "--no-sequence-parallel",
    ],
)
def test_a_small_step_of_each_kind(flags):
    _, planned, step = planned_and_measured(f"{SMALL} {flags}", stage=1)
    assert step.peak == pytest.approx(planned.total, rel=0.03)


@pytest.mark.full
@pytest.mark.parametrize("row", TABLE_4["ROWS"])
def test_table_4_fits_80_gb(row):
    """Within 1 GiB of the plan, and with the reserve to spare."""
    config, planned, step = planned_and_measured(f"{TABLE_4['ROWS'][row]} {TABLE_4['LAYOUT']}")
    assert abs(step.peak - planned.total) < GIB
    assert spare_bytes(config, step.peak) > 0
