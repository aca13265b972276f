"""Ranks that are killed, stopped or told to stop: the others end by themselves in bounded time, say why, and the next start goes on."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.planning.local_ranks import start_ranks
from megatron_llama3.recipes.pretrain import pretrain
from megatron_llama3.training.events import read_lines
from megatron_llama3.training.failures import run_and_exit

FLAGS = (
    "--num-layers 2 --hidden-size 24 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2 --vocab-size 101 --seq-length 16 "
    "--global-batch-size 4 --lr 1e-3 --lr-decay-iters 8 --eval-iters 0 --exit-signal-handler"
)
TWO_BY_TWO = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    prefix = tmp_path_factory.mktemp("data") / "corpus"
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in rng.integers(5, 60, 80):
            writer.add_document(rng.integers(0, 101, length))
        writer.finalize()
    return str(prefix)


def start(flags: str, world_size: int, log: Path, before=lambda: None) -> list:
    def main() -> int:
        before()
        return pretrain(parse_run_config(flags.split()))

    return start_ranks(world_size, lambda: run_and_exit(main), log)


def statuses(processes: list, seconds: float = 120) -> list[int | None]:
    """Exit statuses, minus the signal that killed; None for what is still there after `seconds`, which is then killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return found


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def steps(folder: Path) -> dict[int, float]:
    return {r["iteration"]: r["loss"] for r in read_lines(folder / "metrics.jsonl")}


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


def slow_steps() -> None:
    """So that there is time to do something to the run."""
    next_batch = TrainingStream.next_batch
    TrainingStream.next_batch = lambda *args: (time.sleep(0.05), next_batch(*args))[1]


@pytest.mark.slow
def test_a_signal_ends_with_status_75_and_the_next_start_finishes(data, tmp_path):
    flags = f"{FLAGS} --data-path {data} --train-iters 40 --save {tmp_path} --load {tmp_path}"
    ranks = start(flags, 2, tmp_path / "log", slow_steps)
    wait_for(lambda: len(steps(tmp_path)) >= 3)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    assert statuses(ranks) == [75, 75]
    stopped_at = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= stopped_at < 40
    assert [(e["reason"], e["is_finished"]) for e in events(tmp_path, "stop")] == [("SIGUSR1 was received", False)]
    assert statuses(start(flags, 2, tmp_path / "log")) == [0, 0]
    assert [e["iteration"] for e in events(tmp_path, "start")] == [0, stopped_at]
    assert sorted(steps(tmp_path)) == list(range(1, 41))


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_who_say_so(data, tmp_path):
    flags = f"{FLAGS} --data-path {data} --train-iters 400 --save {tmp_path} --load {tmp_path} --save-interval 2 {TWO_BY_TWO}"
    ranks = start(flags, 4, tmp_path / "log", slow_steps)
    wait_for(lambda: len(steps(tmp_path)) >= 3)
    os.kill(ranks[3].pid, signal.SIGKILL)
    assert statuses(ranks) == [75, 75, 75, -signal.SIGKILL]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 3
    assert all(re.match(r"error: rank [0-2] on \S+ lost contact with another rank in .*: .* start the run again", line) for line in lines)
    assert [e["reason"] for e in events(tmp_path, "failure")] == ["another rank was lost"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])  # rank 0 holds the job's key-value store
def test_a_stopped_rank_is_named_and_the_job_ends(data, tmp_path, victim):
    flags = f"{FLAGS} --data-path {data} --train-iters 400 --save {tmp_path} --hang-timeout-seconds 2 {TWO_BY_TWO}"
    ranks = start(flags, 4, tmp_path / "log", slow_steps)
    wait_for(lambda: len(steps(tmp_path)) >= 3)
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    others = [rank for rank in range(4) if rank != victim]
    assert statuses([ranks[rank] for rank in others]) == [75] * 3
    ranks[victim].kill()
    (hang,) = events(tmp_path, "hang")
    assert hang["rank"] == victim
    assert hang["state"].startswith("does not answer")
    assert re.search(rf"^hang: rank {victim} on \S+ does not answer", (tmp_path / "log").read_text(), re.M)


@pytest.mark.slow
def test_a_rank_that_is_stuck_is_named_with_its_phase(data, tmp_path):
    def stuck_in_the_data_of_step_3() -> None:
        plan_batch, calls = TrainingStream.plan_batch, []

        def stuck(*args):
            calls.append(1)
            if len(calls) == 3 and os.environ["RANK"] == "1":
                time.sleep(1000)
            return plan_batch(*args)

        TrainingStream.plan_batch = stuck

    flags = f"{FLAGS} --data-path {data} --train-iters 400 --log-dir {tmp_path} --hang-timeout-seconds 2"
    assert statuses(start(flags, 2, tmp_path / "log", stuck_in_the_data_of_step_3)) == [75, 75]
    (hang,) = events(tmp_path, "hang")
    assert (hang["rank"], hang["state"], hang["phase"], hang["iteration"]) == (1, "is behind, it is", "reading data", 2)
    assert hang["call"].startswith("stuck (test_resilience.py")
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 2
