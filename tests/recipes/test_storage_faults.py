"""A file system that fails for a while, under a run or at its start: training goes on and ends where it would have, bit by bit; one that
fails for good ends the run with status 75, to be started again."""

import errno
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_llama3.checkpoint.native import manifest, metadata, open_native_tensors
from megatron_llama3.checkpoint.native.threaded_writer import ThreadedWriter
from megatron_llama3.config import storage
from megatron_llama3.training.events import read_lines
from tests.recipes.jobs import FLAGS, TWO_BY_TWO, events, losses, slow_steps, start, statuses, wait_for

STEPS = 20
RUN = f"{FLAGS} --train-iters {STEPS} --save-interval 2 {TWO_BY_TWO}"
STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert statuses(start(f"{RUN} --data-path {data} --save {folder}", 4, folder / "log")) == [0] * 4
    return folder


def assert_same_end(save: Path, undisturbed: Path) -> None:
    """Every step's loss, in the order of steps, and every tensor at the end."""
    assert [r["iteration"] for r in read_lines(save / "metrics.jsonl") if "lr" in r] == list(range(1, STEPS + 1))
    assert losses(save) == losses(undisturbed)
    ours, theirs = (open_native_tensors(folder / f"iter_{STEPS:07d}") for folder in (save, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].rows(0, ours[key].shape[0]), theirs[key].rows(0, theirs[key].shape[0])) for key in ours)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    assert not list(save.glob("iter_*.*"))


def lines(log: Path, pattern: str) -> list[str]:
    return [line for line in log.read_text().splitlines() if re.search(pattern, line)]


def short_waits() -> None:
    storage.FIRST_WAIT = 0.05
    storage.LONGEST_WAIT = 0.2


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_folder_that_cannot_be_written_for_a_while_ends_no_run(data, tmp_path, small_disk, undisturbed, kind):
    save, log = small_disk("3m"), tmp_path / "log"
    ranks = start(f"{RUN} --data-path {data} --save {save} --keep-last 1", 4, log, slow_steps)
    wait_for(lambda: (save / "iter_0000004").exists())
    if kind == "full":
        with open(save / "ballast", "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)) == 1 << 16:
                pass
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(save)], check=True)
    wait_for(lambda: lines(log, "checkpoint could not be written"))
    time.sleep(0.3)
    (save / "ballast").unlink() if kind == "full" else subprocess.run(["mount", "-o", "remount,rw", str(save)], check=True)
    assert statuses(ranks) == [0] * 4
    failed = events(save, "save_failed")
    assert [event["attempt"] for event in failed] == list(range(1, len(failed) + 1))
    assert len(lines(log, "checkpoint could not be written")) == len(failed) <= 4, "at the next step, then after 1, 2 and 4 seconds"
    assert len(lines(log, "metrics.jsonl: could not be written")) <= 1, "said once"
    assert "Traceback" not in log.read_text()
    assert_same_end(save, undisturbed)


def test_one_rank_of_four_that_fails_to_write_is_waited_for(data, tmp_path, undisturbed):
    def stale_on_rank_2() -> None:
        short_waits()
        write, calls = ThreadedWriter.write_data, []

        def fails(*args):
            calls.append(1)
            if os.environ["RANK"] == "2" and len(calls) in (1, 2, 5):
                raise STALE
            return write(*args)

        ThreadedWriter.write_data = fails

    assert statuses(start(f"{RUN} --data-path {data} --save {tmp_path}", 4, tmp_path / "log", stale_on_rank_2)) == [0] * 4
    found = events(tmp_path, "save_failed")
    assert [event["attempt"] for event in found] == [1, 2, 1]
    assert found[0]["reason"] == f"--save {tmp_path}: checkpoint could not be written: {os.strerror(errno.ESTALE)}"
    assert found[1]["iteration"] > found[0]["iteration"]
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("where", ["metadata", "tensors", "manifest"])
def test_one_rank_that_fails_to_read_at_the_start_is_waited_for(data, tmp_path, undisturbed, where):
    def stale_at_first() -> None:
        short_waits()
        calls = []

        def stale_twice(function, rank: int):
            def fails(*args, **kwargs):
                calls.append(1)
                if os.environ["RANK"] == str(rank) and len(calls) <= 2:
                    raise STALE
                return function(*args, **kwargs)

            return fails

        if where == "metadata":
            metadata.read_metadata = stale_twice(metadata.read_metadata, 1)
        elif where == "tensors":
            FileSystemReader.read_data = stale_twice(FileSystemReader.read_data, 3)
        else:
            manifest.is_there = stale_twice(manifest.is_there, 0)

    half = f"{RUN} --data-path {data} --save {tmp_path} --auto-resume"
    assert statuses(start(f"{half} --exit-interval 12", 4, tmp_path / "log")) == [0] * 4
    assert statuses(start(half, 4, tmp_path / "log", stale_at_first)) == [0] * 4
    assert [event["iteration"] for event in events(tmp_path, "start")] == [0, 12], "it started from the last checkpoint all the same"
    assert len(lines(tmp_path / "log", "storage fails: .*Stale file handle; tried again")) == 1
    assert_same_end(tmp_path, undisturbed)


def test_storage_that_fails_for_too_long_ends_every_rank_with_75(data, tmp_path):
    def stale_on_rank_1() -> None:
        def fails(*args):
            raise STALE

        if os.environ["RANK"] == "1":
            ThreadedWriter.write_data = fails

    flags = f"{FLAGS} --train-iters 4000 --save-interval 2 --data-path {data} --save {tmp_path} --storage-retry-minutes 0.05"
    assert statuses(start(flags, 2, tmp_path / "log", stale_on_rank_1)) == [75, 75]
    assert len(events(tmp_path, "save_failed")) == 3, "at once, and after 1 and 2 seconds"
    assert f"--save {tmp_path}: checkpoint could not be written" in events(tmp_path, "failure")[0]["reason"]
    assert not list(tmp_path.glob("iter_*"))


def test_a_folder_that_will_never_do_is_refused_at_once(data, tmp_path):
    (tmp_path / "file").write_text("")
    log = tmp_path / "log"
    for flag in (f"--save {tmp_path}/file/run", f"--log-dir {tmp_path}/file", f"--log-dir {tmp_path} --tensorboard-dir {tmp_path}/file/tb"):
        assert 2 in statuses(start(f"{FLAGS} --train-iters 2 --data-path {data} {flag}", 2, log))
        (line, *_) = lines(log, "^error: ")
        assert "Not a directory" in line or "File exists" in line
        assert "Traceback" not in log.read_text()
        log.unlink()
