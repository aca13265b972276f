"""A small pretraining job on forked ranks that a test does something to, and what is left of it."""

import time
from pathlib import Path

from megatron_llama3.config.command_line import parse_run_config
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


def losses(folder: Path) -> dict[int, float | None]:
    return {r["iteration"]: r.get("loss") for r in read_lines(folder / "metrics.jsonl") if "lr" in r}


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


def slow_steps() -> None:
    """So that there is time to do something to the run."""
    next_batch = TrainingStream.next_batch
    TrainingStream.next_batch = lambda *args: (time.sleep(0.05), next_batch(*args))[1]
