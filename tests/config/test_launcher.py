"""A launcher's environment with a gap is one line, before torch is imported."""

import socket
import threading
import time

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.launcher import check_launcher, wait_for_rank_0
from megatron_llama3.training.failures import has_lost_contact

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


def test_a_rank_waits_for_rank_0_and_is_lost_without_it(environment):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        environment(WHOLE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        with pytest.raises(RuntimeError, match=rf"rank 0 at 127.0.0.1:{port}, which did not come in 0 minutes") as caught:
            wait_for_rank_0(0)
        assert has_lost_contact(caught.value)
        threading.Timer(0.5, listener.listen).start()
        started = time.monotonic()
        wait_for_rank_0(1)
        assert 0.4 < time.monotonic() - started < 10
    environment({"RANK": "0", "MASTER_PORT": "1"})
    wait_for_rank_0(0)  # it is rank 0 that the others wait for
