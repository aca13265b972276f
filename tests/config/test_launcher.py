"""A launcher's environment with a gap is one line, before torch is imported."""

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.launcher import check_launcher

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
NAMES = (*WHOLE, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_JOB_ID")


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def set_all(values: dict) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    "values",
    [{}, WHOLE, {"WORLD_SIZE": "1"}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, WHOLE | {"SLURM_PROCID": "3"}],
    ids=["nothing", "torchrun", "world of one", "a batch script's own process", "srun with RANK"],
)
def test_whole_ones_pass(environment, values):
    environment(values)
    check_launcher()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, but no RANK"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, "task 3 of srun, but there is no RANK"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}, "task 0 of 8 of srun"),
        *[({k: v for k, v in WHOLE.items() if k != name}, f"but no {name}") for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")],
        (WHOLE | {"RANK": "2"}, "RANK=2 in the environment, but WORLD_SIZE=2"),
        (WHOLE | {"RANK": "-1"}, "RANK=-1"),
        (WHOLE | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ],
)
def test_gaps_are_one_line(environment, values, expected):
    environment(values)
    with pytest.raises(UserError, match=expected) as caught:
        check_launcher()
    assert "\n" not in str(caught.value)
