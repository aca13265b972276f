"""Does a run survive anything? A small job on gloo ranks is hit by faults until it ends; its weights are then compared bit by bit with
those of a run that nothing happened to.

    python benchmarks/survive.py --faults 40 [--seed 1] [--ranks 4] [--folder DIR]

Faults, in an order drawn from the seed: `kill -9` of a rank at any moment, or while a save is being written; of the whole job, at any
moment or in a save; a disk that stays full (files end at RLIMIT_FSIZE); a file system that is stale for a while on one rank, which must end
nothing, so that SIGTERM ends the job after it; SIGTERM; SIGSTOP of a rank, at any moment, or at the beginning of a save or a load, which
must then be named. After each the job is started again by the same command with --auto-resume. Ranks are forked from this process, which
has imported everything.
"""

import argparse
import errno
import json
import os
import platform
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_llama3.checkpoint import store
from megatron_llama3.checkpoint.native import threaded_writer
from megatron_llama3.checkpoint.native.weights import open_native_tensors, resolve_native
from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.data.loader import TrainingStream, batch_hash
from megatron_llama3.planning.local_ranks import start_ranks
from megatron_llama3.recipes.pretrain import pretrain
from megatron_llama3.training.events import append_line, read_lines
from megatron_llama3.training.failures import run_and_exit
from megatron_llama3.training.stop import RESTART_STATUS

VOCABULARY = 2003
SAVE_INTERVAL = 3
PATIENCE = 120.0  # seconds in which a job that was hit must have ended by itself
FAULTS = ("kill rank", "kill rank in save", "kill job", "kill job in save", "full disk", "SIGTERM", "stop rank") + (
    "storage blip", "stop in save", "stop in load",
)  # fmt: skip
PHASES = {"stop in save": "save", "stop in load": "loading a checkpoint"}
FILE_SIZES = (300_000, 900_000)  # a rank's part of a checkpoint is larger
STEPS_A_FAULT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="faults to survive")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4), help="2: DP 2; 4: TP 2 x PP 2")
    parser.add_argument("--folder", type=Path, help="where the runs go; default a temporary folder that is removed")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="survive-"))
    folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(folder, arguments.ranks, arguments.faults, random.Random(arguments.seed))
    try:
        soak.run()
        is_same = soak.report()
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(0 if is_same else 1)


@dataclass
class Soak:
    folder: Path
    ranks: int
    wanted: int
    random: random.Random
    faults: list[str] = field(default_factory=list)
    ending_seconds: dict[str, list[float]] = field(default_factory=dict)
    """from a fault to the end of the last rank, by kind"""
    steps_lost: int = 0
    wrong: list[str] = field(default_factory=list)
    starts: int = 0
    failed_saves: int = 0
    """before this start"""
    started: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> int:
        return STEPS_A_FAULT * self.wanted

    def run(self) -> None:
        """The unbroken run, then the one that is hit, on enough steps for every fault."""
        write_corpus(self.folder / "corpus")
        ended = self.join(self.start("unbroken"), 3600)
        if any(ended):
            raise RuntimeError(f"the unbroken run ended with {ended}, see {self.folder / 'unbroken-1.log'} (--folder keeps it)")
        while not self.is_finished():
            self.one_start()

    def one_start(self) -> None:
        """Starts the job, hits it if faults are left to inject, and waits for its end."""
        fault = self.random.choice(FAULTS) if len(self.faults) < self.wanted else None
        before = self.last_saved()
        if fault == "stop in load" and not before:
            fault = "stop in save"  # there is nothing to load yet
        victim, size = self.random.randrange(self.ranks), self.random.randint(*FILE_SIZES)
        self.failed_saves = len(self.events("save_failed"))
        ranks = self.start("hit", lambda: plant(fault, victim, size))
        hit_at = time.monotonic()
        killed = self.hit(fault, ranks, victim) if fault is not None else []
        ended = self.join([rank for i, rank in enumerate(ranks) if i not in killed], PATIENCE if fault else 3600)
        for rank in ranks:
            rank.kill()  # a rank that was stopped
            rank.join()
        if fault is None or (self.is_finished() and fault != "full disk"):
            return  # it came to its end before the fault did
        self.faults.append(fault)
        self.ending_seconds.setdefault(fault, []).append(time.monotonic() - hit_at)
        if set(ended) - {RESTART_STATUS}:
            self.wrong.append(f"fault {len(self.faults)}, {fault}: the other ranks ended with {ended}")
        named = [event["rank"] for event in self.events("hang")[-1:] if event["phase"].endswith(PHASES.get(fault, ""))]
        if fault in PHASES and named != [victim]:
            self.wrong.append(f"fault {len(self.faults)}, {fault}: rank {victim} was not named")
        done = max((r["iteration"] for r in read_lines(self.folder / "hit" / "metrics.jsonl")[self.lines :]), default=before)
        self.steps_lost += max(0, done - self.last_saved())
        print(f"{len(self.faults):>4} {fault:<18} at step {done:>4}, saved {self.last_saved():>4}, statuses {ended}", flush=True)

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_lines(self.folder / "hit" / "events.jsonl") if event["event"] == kind]

    def start(self, name: str, before: Callable[[], None] = lambda: None) -> list:
        save = self.folder / name
        self.lines = len(read_lines(save / "metrics.jsonl"))
        flags = job_flags(self.folder, save, self.ranks, steps=self.steps)

        def job() -> int:
            before()
            note_batches(self.folder / f"{name}-batches-{os.environ['RANK']}.jsonl")
            return pretrain(parse_run_config(flags.split()))

        self.starts += 1
        return start_ranks(self.ranks, lambda: run_and_exit(job), self.folder / f"{name}-{self.starts}.log")

    def hit(self, fault: str, ranks: list, victim: int) -> list[int]:
        """Injects the fault at a random moment, if it was not planted. Returns the ranks that do not end by themselves."""
        if fault == "full disk" or fault in PHASES:
            return [victim] if fault in PHASES else []
        if fault == "storage blip":
            self.wait(lambda: len(self.events("save_failed")) > self.failed_saves, ranks)
        steps = self.random.randint(1, 12)
        metrics = self.folder / "hit" / "metrics.jsonl"
        self.wait(lambda: len(read_lines(metrics)) - self.lines >= steps, ranks)
        if fault.endswith("in save"):
            self.wait(lambda: any(self.folder.glob("hit/iter_*.partial")), ranks)
        time.sleep(self.random.random() * 0.05)
        victims = list(range(self.ranks)) if "job" in fault else [victim]
        number = {"SIGTERM": signal.SIGTERM, "storage blip": signal.SIGTERM, "stop rank": signal.SIGSTOP}.get(fault, signal.SIGKILL)
        for rank in victims:
            os.kill(ranks[rank].pid, number)
        return [] if number == signal.SIGTERM else victims

    def wait(self, condition, ranks: list) -> None:
        """Until `condition` holds or the job has ended."""
        while not condition() and any(rank.is_alive() for rank in ranks):
            time.sleep(0.002)

    @staticmethod
    def join(ranks: list, seconds: float) -> list[int | None]:
        deadline = time.monotonic() + seconds
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        return [rank.exitcode for rank in ranks]

    def last_saved(self) -> int:
        path = self.folder / "hit" / "latest_checkpointed_iteration.txt"
        return int(path.read_text()) if path.exists() else 0

    def is_finished(self) -> bool:
        return self.last_saved() >= self.steps

    def report(self) -> bool:
        """Prints the result; whether nothing was lost."""
        different = compare_checkpoints(self.folder / "unbroken", self.folder / "hit")
        data_lost = compare_data(self.folder, self.ranks)
        kinds = Counter(self.faults)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(f"\n{machine}; {self.ranks} gloo ranks, {self.steps} steps, {self.starts - 1} starts")
        print(f"faults survived     {len(self.faults)} in {time.monotonic() - self.started:.0f} s")
        for kind, count in kinds.most_common():
            print(f"  {count:>4}  {kind:<18} all ended by themselves within {max(self.ending_seconds[kind]):.1f} s of their start")
        print(f"steps lost          {self.steps_lost} (done, not saved, and done again)")
        print(f"data lost           {len(data_lost)} of {self.steps} steps read another batch than the unbroken run")
        print(f"tensors different   {len(different)} of {different.total}, weights and moments, bit by bit")
        for line in [*self.wrong, *data_lost[:5], *different[:5]]:
            print(f"  {line}")
        return not (different or data_lost or self.wrong)


def write_corpus(prefix: Path) -> None:
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for length in rng.integers(5, 200, 400):
            writer.add_document(rng.integers(0, VOCABULARY, length))
        writer.finalize()


def job_flags(folder: Path, save: Path, ranks: int, steps: int) -> str:
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel" if ranks == 4 else ""
    return (
        f"--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2 --vocab-size {VOCABULARY} "
        f"--seq-length 32 --global-batch-size 4 --lr 1e-3 --lr-warmup-iters 10 --eval-iters 0 {layout} --data-path {folder / 'corpus'} "
        f"--split 1,0,0 --train-iters {steps} --save {save} --auto-resume --save-interval {SAVE_INTERVAL} --keep-last 2 "
        "--exit-signal-handler --hang-timeout-seconds 3 --distributed-timeout-minutes 1 --storage-retry-minutes 0.1"
    )


def plant(fault: str | None, victim: int, file_size: int) -> None:
    """In a rank, before it trains: the faults that strike by themselves."""
    if fault == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if os.environ["RANK"] != str(victim):
        return
    if fault == "storage blip":
        fail_for_a_while(threaded_writer.ThreadedWriter, "write_data", seconds=1.0)
    if fault == "stop in save":
        stop_in(store.CheckpointWriter, "save")
    if fault == "stop in load":
        stop_in(store, "_load_tensors")


def stop_in(owner, name: str) -> None:
    setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))


def fail_for_a_while(owner, name: str, seconds: float) -> None:
    """From the first call on."""
    function, began = getattr(owner, name), []

    def fails(*arguments):
        began.append(time.monotonic())
        if began[-1] - began[0] < seconds:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return function(*arguments)

    setattr(owner, name, fails)


def note_batches(path: Path) -> None:
    """Keeps a hash of every batch that a rank reads, by its place in the stream."""
    next_batch = TrainingStream.next_batch

    def noted(stream: TrainingStream, *arguments):
        batch = next_batch(stream, *arguments)
        append_line(path, {"sequences": stream.state_dict()["sources"][0]["sequences"], "hash": batch_hash(batch)})
        return batch

    TrainingStream.next_batch = noted


class Different(list):
    """Names of tensors that differ, and how many there are in all."""

    total = 0


def compare_checkpoints(one: Path, other: Path) -> Different:
    ours, theirs = (open_native_tensors(resolve_native(folder)) for folder in (one, other))
    different = Different(sorted(ours.keys() ^ theirs.keys()))
    different.total = len(ours.keys() | theirs.keys())
    for key in sorted(ours.keys() & theirs.keys()):
        a, b = ours[key].rows(0, ours[key].shape[0]), theirs[key].rows(0, theirs[key].shape[0])
        if a.dtype != b.dtype or not torch.equal(a, b):
            different.append(key)
    return different


def compare_data(folder: Path, ranks: int) -> list[str]:
    """A line for each step of a rank whose last reading was not what the unbroken run read, and for a different place at the end."""
    lost = []
    for rank in range(ranks):
        files = [folder / f"{name}-batches-{rank}.jsonl" for name in ("unbroken", "hit")]
        unbroken, hit = ({line["sequences"]: line["hash"] for line in read_lines(file)} for file in files)
        lost += [f"rank {rank}, after {place} sequences" for place in sorted(unbroken | hit) if unbroken.get(place) != hit.get(place)]
    places = [json.loads((resolve_native(folder / name) / "train_state.json").read_text())["data"] for name in ("unbroken", "hit")]
    return lost + ([] if places[0] == places[1] else ["the position at the end"])


if __name__ == "__main__":
    main()
