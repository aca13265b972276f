"""The sbatch scripts on a real Slurm: two nodes on this machine, started by scripts/slurm_local.sh. Skipped only where Slurm cannot be
installed, and not even there if REQUIRE_SLURM is set, as .ci/run does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.data.preprocess import preprocess
from tests.slurm_cluster import PATIENCE
from tests.tools.preprocess_helpers import documents, options, output_bytes, vocabulary_folder, write_jsonl

pytestmark = pytest.mark.slow

VOCABULARY = 1024  # entries of preprocess_helpers.vocabulary_folder
STEPS = 40
RUN = [
    *["examples/pretrain_llama3_8b.sh", "--model-name", "tiny", "--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64"],
    *["--num-attention-heads", "4", "--num-query-groups", "2", "--vocab-size", str(VOCABULARY), "--no-compile-blocks", "--no-bf16"],
    *["--step-batch-size-schedule", "0:4", "--seq-length-schedule", "0:16", "--train-iters", str(STEPS), "--save-interval", "4"],
    *["--lr-warmup-iters", "2", "--lr-decay-iters", str(STEPS), "--eval-iters", "0", "--lr", "1e-3"],
]


def until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.1)


def losses(folder: Path) -> dict[int, set[float]]:
    """By step, all that were logged for it: a step done again after a failure must give what it gave before."""
    found: dict[int, set[float]] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n") and "loss" in (record := json.loads(line)):
            found.setdefault(record["iteration"], set()).add(record["loss"])
    return found


def rank_process(job: str, rank: int) -> int:
    """Process id of a rank of a job."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environ.read_bytes().split(b"\0")
            program = (environ.parent / "cmdline").read_bytes()
        except OSError:
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()} <= set(variables)
        if wanted and program.startswith(sys.executable.encode()) and b"megatron_llama3.recipes.pretrain" in program:
            return int(environ.parent.name)
    raise LookupError(f"no rank {rank} of job {job}")


@pytest.fixture
def inputs(tmp_path) -> dict[str, str]:
    """The example's settings: a dataset and a tokenizer."""
    prefix, rng = tmp_path / "corpus", np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in rng.integers(5, 60, 80):
            writer.add_document(rng.integers(0, VOCABULARY, length))
        writer.finalize()
    return {"DATA_PATH": str(prefix), "TOKENIZER_MODEL": str(vocabulary_folder(tmp_path))}


def test_a_job_survives_preemption_a_killed_rank_and_a_lost_node(slurm, inputs, tmp_path):
    """Two nodes of two tasks; at the end the losses are those of a run under torchrun that nothing broke, bit by bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    slurm.run("bash", *RUN, CHECKPOINTS=str(whole), GPUS_PER_NODE="4", **inputs)

    layout = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={tmp_path}/job.log"]
    job = slurm.submit(*layout, "scripts/pretrain.sbatch", *RUN, CHECKPOINTS=str(broken), LOGS=str(tmp_path / "logs"), **inputs)

    def restarted(times: int) -> bool:
        return slurm.job(job)["Restarts"] == str(times)

    def reached(step: int, attempt: int) -> None:
        until(f"step {step} in attempt {attempt}", lambda: restarted(attempt) and max(losses(broken), default=0) >= step)

    reached(5, attempt=0)
    slurm.run("scancel", "--signal=USR1", job)
    until("requeue after preemption", lambda: restarted(1))
    saved = max(losses(broken))
    assert (broken / "latest_checkpointed_iteration.txt").read_text().strip() == str(saved)

    reached(saved + 5, attempt=1)
    os.kill(rank_process(job, 3), signal.SIGKILL)
    until("requeue after a killed rank", lambda: restarted(2))

    reached(max(losses(broken)) + 5, attempt=2)
    hung = rank_process(job, 3)
    os.kill(hung, signal.SIGSTOP)  # a node that is lost makes no more steps
    assert slurm.local("kill-node", "n2").returncode == 0
    until("requeue after a lost node", lambda: restarted(3))
    assert slurm.local("start-node", "n2").returncode == 0

    until("the end", lambda: slurm.states(job) == ["COMPLETED"])
    assert losses(broken) == losses(whole)
    assert sorted(losses(broken)) == list(range(1, STEPS + 1))
    exits = (tmp_path / "logs" / "exits").read_text().splitlines()
    assert exits[:2] == ["attempt 0, rank 0 on n1: status 75 after a signal", "attempt 1, rank 3 on n2: status 137"]
    assert len(list((tmp_path / "logs").glob("rank_*.log"))) == 4
    assert not Path(f"/proc/{hung}").exists()


def test_a_node_lost_for_good_ends_no_run(slurm, inputs, tmp_path):
    """Of one or two nodes it has two, then one: half the data-parallel ranks, twice the micro-batches, the same batches."""
    whole, shrunk, log = tmp_path / "whole", tmp_path / "shrunk", tmp_path / "job.log"
    slurm.run("bash", *RUN, CHECKPOINTS=str(whole), GPUS_PER_NODE="2", **inputs)
    layout = ["--nodes=1-2", "--gpus-per-node=0", f"--output={log}"]
    where = {"CHECKPOINTS": str(shrunk), "LOGS": str(tmp_path / "logs"), "TASKS_PER_NODE": "2"}
    job = slurm.submit(*layout, "scripts/pretrain.sbatch", *RUN, **inputs, **where)
    until("step 9", lambda: max(losses(shrunk), default=0) >= 9)
    assert slurm.job(job)["NumNodes"] == "2"
    os.kill(rank_process(job, 3), signal.SIGSTOP)
    assert slurm.local("kill-node", "n2").returncode == 0
    try:
        until("the end on one node", lambda: slurm.states(job) == ["COMPLETED"])
    finally:
        assert slurm.local("start-node", "n2").returncode == 0
    assert (slurm.job(job)["Restarts"], slurm.job(job)["NumNodes"]) == ("1", "1")
    now = "2 tasks on 1 of 1 nodes: DP 1, 4 micro-batches for a global batch of 4"
    before = "4 tasks on 2 of 2 nodes: DP 2, 2 micro-batches for a global batch of 4"
    assert f"the run goes on with the same batches: {now} (before: {before})" in log.read_text()
    expected = {step: pytest.approx(max(values), abs=1e-6) for step, values in losses(whole).items()}
    assert {step: max(values) for step, values in losses(shrunk).items()} == expected
    assert all(max(values) - min(values) < 1e-6 for values in losses(shrunk).values()), "a step done again read the same documents"


def test_a_file_system_that_is_read_only_for_a_while_ends_no_job(slurm, inputs, tmp_path, small_disk):
    whole, save, log = tmp_path / "whole", small_disk("40m"), tmp_path / "job.log"
    slurm.run("bash", *RUN, CHECKPOINTS=str(whole), GPUS_PER_NODE="4", **inputs)
    layout = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={log}"]
    job = slurm.submit(*layout, "scripts/pretrain.sbatch", *RUN, CHECKPOINTS=str(save), LOGS=str(tmp_path / "logs"), **inputs)
    until("step 5", lambda: max(losses(save), default=0) >= 5)
    subprocess.run(["mount", "-o", "remount,ro", str(save)], check=True)
    time.sleep(3)
    subprocess.run(["mount", "-o", "remount,rw", str(save)], check=True)
    until("the end", lambda: slurm.states(job) == ["COMPLETED"])
    assert slurm.job(job)["Restarts"] == "0", log.read_text()
    assert losses(save) == losses(whole)
    assert not (tmp_path / "logs" / "exits").exists()


def test_at_its_time_limit_a_job_saves_and_goes_on(slurm, inputs, tmp_path):
    """The signal comes within a minute of the start, and the run has more steps than fit."""
    save, log = tmp_path / "save", tmp_path / "job.log"
    layout = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=2", "--signal=USR1@60", f"--output={log}"]
    steps = ["--train-iters", "100000", "--lr-decay-iters", "100000", "--save-interval", "100000"]
    job = slurm.submit(*layout, "scripts/pretrain.sbatch", *RUN, *steps, CHECKPOINTS=str(save), LOGS=str(tmp_path / "logs"), **inputs)
    until("requeue before the limit", lambda: slurm.job(job)["Restarts"] == "1")
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    until("the next attempt's steps", lambda: max(losses(save)) > saved)
    slurm.run("scancel", job)
    assert saved == max(step for step, values in losses(save).items() if step <= saved)
    assert "saved, and work is left; requeued" in log.read_text()


def test_a_missing_interpreter_is_one_line_and_no_requeue(slurm, inputs, tmp_path):
    log = tmp_path / "job.log"
    layout = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={log}"]
    nowhere = {"PYTHON": "/no/such/python", "PREFLIGHT": "no", "CHECKPOINTS": str(tmp_path / "save"), "LOGS": str(tmp_path / "logs")}
    job = slurm.submit(*layout, "scripts/pretrain.sbatch", *RUN, **inputs, **nowhere)
    until("the end", lambda: slurm.states(job) == ["FAILED"])
    assert slurm.job(job)["Restarts"] == "0"
    assert "a program or script is missing or cannot be run; not requeued" in log.read_text()


def test_rank_0_is_met_where_an_arbitrary_placement_puts_it(slurm, inputs, tmp_path):
    log, hosts = tmp_path / "job.log", tmp_path / "hosts"
    hosts.write_text("n2\nn2\nn1\nn1\n")
    layout = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--gpus-per-node=0", "--distribution=arbitrary", f"--output={log}"]
    where = {"SLURM_HOSTFILE": str(hosts), "CHECKPOINTS": str(tmp_path / "save"), "LOGS": str(tmp_path / "logs")}
    job = slurm.submit(*layout, "scripts/pretrain.sbatch", *RUN, "--train-iters", "4", "--lr-decay-iters", "4", **inputs, **where)
    until("the end", lambda: slurm.states(job) in (["COMPLETED"], ["FAILED"]))
    assert slurm.states(job) == ["COMPLETED"], log.read_text()
    (of_rank_0,) = (tmp_path / "logs").glob("rank_00000_*.log")
    assert "attempt 0, rank 0 on n2\n" in of_rank_0.read_text()


def test_tasks_of_an_array_make_one_dataset(slurm, tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", documents(30 + i, seed=i) * 60) for i in range(4)]
    whole = options(tmp_path, *files, prefix="whole")
    preprocess(whole)
    flags = ["--output-prefix", str(tmp_path / "shards" / "c"), "--tokenizer-model", str(vocabulary_folder(tmp_path)), "--append-eod"]
    array = ["--array=0-1", "--cpus-per-task=1", f"--output={tmp_path}/%a.log", "scripts/preprocess_array.sbatch"]
    job = slurm.submit(*array, "--input", *map(str, files), *flags)
    until("the end of the array", lambda: slurm.states(job) == ["COMPLETED", "COMPLETED"])
    merged = tmp_path / "merged_text_document"
    slurm.run(sys.executable, "tools/merge_datasets.py", "--input", str(tmp_path / "shards"), "--output-prefix", str(merged))
    for suffix in (".bin", ".idx"):
        assert output_bytes(whole)[suffix] == merged.with_suffix(suffix).read_bytes()
