"""tools/preprocess_data.py killed at every write, out of disk, robbed of a worker, and run twice at once."""

import dataclasses
import io
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.data import preprocess as preprocess_module
from megatron_llama3.data import preprocess_worker
from megatron_llama3.data.preprocess import preprocess
from megatron_llama3.data.preprocess_job import JobFolder
from tests.tools.preprocess_helpers import decoded, documents, forked, options, output_bytes, run, small_units, write_jsonl

TEXTS = documents(60, seed=1)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of several shards with a bad line in it, and the bytes that it makes when left alone."""
    small_units(monkeypatch, 8000)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + b"broken\n")
    undisturbed = options(tmp_path, path, prefix="undisturbed")
    preprocess(undisturbed)
    job = options(tmp_path, path)
    job_expected = output_bytes(undisturbed), (tmp_path / "undisturbed.rejected.jsonl").read_bytes()
    return job, job_expected


def _made(job):
    report = f"{job.prefix}.rejected.jsonl"
    with open(report, "rb") as file:
        return output_bytes(job), file.read()


def _killed_at(number, job, points):
    """Runs the job with SIGKILL at the `number`th call, in parent or worker, of one of `points` (module, name)."""

    def action():
        counter = itertools.count(1)

        def deadly(function):
            def call(*arguments, **keywords):
                if next(counter) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        for owner, name in points:
            setattr(owner, name, deadly(getattr(owner, name)))
        preprocess(job)

    return forked(action)


PARENT_POINTS = [(os, "replace"), (os, "unlink"), (os, "fsync"), (os, "mkdir"), (os, "rmdir")]


@pytest.mark.slow
@pytest.mark.parametrize("over_an_old_result", [False, True])
def test_killed_at_every_write_of_the_parent(job, over_an_old_result, tmp_path):
    job, expected = job
    old = options(tmp_path, tmp_path / "a.jsonl", append_eod=False)
    for number in itertools.count(1):
        if over_an_old_result:
            preprocess(old)
            old_bytes = output_bytes(old)
        status, message = _killed_at(number, job, PARENT_POINTS)
        if status == 0:
            break
        assert (status, message) == (-signal.SIGKILL, "")
        index = f"{job.prefix}_text_document.idx"
        if os.path.exists(index):  # then it is a whole dataset, the old or the new one
            decoded(job)
            assert output_bytes(job) in (expected[0], old_bytes if over_an_old_result else None)
        preprocess(job)
        assert _made(job) == expected
        for path in tmp_path.glob("out*"):
            path.unlink()
    assert number > 10


@pytest.mark.slow
def test_killed_at_every_write_of_a_worker(job, tmp_path):
    job, expected = job
    points = [(preprocess_worker.KeyWriter, "_write"), (preprocess_worker.KeyWriter, "close"), (preprocess_worker, "write_whole")]
    for number in itertools.count(1):
        status, message = _killed_at(number, job, points)
        if status == 0:
            break
        assert status == 2
        assert "was killed by signal 9" in message
        assert "the same command continues" in message
        assert not list(tmp_path.glob("out_text_document.*"))
        preprocess(job)
        assert _made(job) == expected
        for path in tmp_path.glob("out*"):
            path.unlink()
    assert number > 5


def test_a_resumed_job_does_only_what_is_left(job, tmp_path, monkeypatch):
    job, expected = job
    status, _ = _killed_at(1, job, [(preprocess_module.Assembler, "finalize")])
    assert status == -signal.SIGKILL
    monkeypatch.setattr(preprocess_module.WorkerPool, "submit", lambda *_: pytest.fail("a shard was made again"))
    preprocess(job)
    assert _made(job) == expected


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: b""])
@pytest.mark.parametrize("file", ["tokens.0.bin", "000001.0.docs", "000001.json"])
def test_a_spoilt_shard_is_made_again(job, file, spoil, tmp_path):
    """What a power cut may leave: a shard whose data never reached the disk."""
    job, expected = job
    _killed_at(1, job, [(preprocess_module.Assembler, "finalize")])
    path = tmp_path / "out.preprocess" / file
    path.write_bytes(spoil(path.read_bytes()))
    preprocess(job)
    assert _made(job) == expected


def test_another_job_in_its_place_is_refused(job, tmp_path):
    job, _ = job
    _killed_at(1, job, [(preprocess_module.Assembler, "finalize")])
    with pytest.raises(UserError, match="unfinished job with another --append-eod"):
        preprocess(options(tmp_path, tmp_path / "a.jsonl", append_eod=False))
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:-1])
    with pytest.raises(UserError, match="unfinished job with another --input"):
        preprocess(job)


@pytest.mark.parametrize("limit", [100, 5_000, 20_000])
def test_a_full_disk_is_a_clear_error_and_resumable(job, limit, tmp_path):
    job, expected = job

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        preprocess(job)

    status, message = forked(limited)
    assert status == 2
    assert "File too large; the same command continues" in message
    assert not list(tmp_path.glob("out_text_document.*"))
    preprocess(job)
    assert _made(job) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_is_a_clear_error_and_resumable(job, small_disk, tmp_path):
    """What the file-size limit above cannot show: no byte left for the notes of what failed either."""
    job, expected = job
    job = dataclasses.replace(job, output_prefix=str(small_disk / "out"))
    status, message = run(job)
    assert status == 2
    assert "No space left on device; the same command continues" in message
    assert not list(small_disk.glob("out_text_document.*"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert list(small_disk.glob("out.preprocess/*.json"))  # what it made is kept
    preprocess(job)
    assert _made(job) == expected
    assert [path.name for path in small_disk.glob("out*") if "partial" in path.name or "preprocess" in path.name] == []


def test_two_runs_on_one_output_refuse_each_other(job, tmp_path):
    job, expected = job
    with JobFolder(job.prefix):
        status, message = run(job)
    assert status == 2
    assert "another run is writing this output" in message
    preprocess(job)
    assert _made(job) == expected


def test_a_killed_parent_leaves_no_worker_and_no_lock(job, tmp_path):
    job, expected = job

    def slow():
        preprocess_worker.KeyWriter.close = lambda *_: time.sleep(3)
        preprocess(job)

    killer = threading.Timer(1.5, lambda: os.kill(_holder(tmp_path / "out.preprocess"), signal.SIGKILL))
    killer.start()
    status, _ = forked(slow)
    assert status == -signal.SIGKILL
    preprocess(job)
    assert _made(job) == expected


def _holder(path):
    """The process that holds the lock on a folder."""
    inode = str(os.stat(path).st_ino)
    with open("/proc/locks") as locks:
        return next(int(line.split()[4]) for line in locks if line.split()[5].endswith(f":{inode}"))


def test_interrupted_standard_input_resumes_with_the_same_input_only(job, tmp_path, monkeypatch):
    _, (expected, report) = job
    monkeypatch.setattr(preprocess_module, "_SPOOL_BYTES", 5000)
    data = (tmp_path / "a.jsonl").read_bytes()
    piped = options(tmp_path, "-")

    def feed(bytes_in):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes_in)))

    feed(data)
    status, _ = _killed_at(1, piped, [(preprocess_module.Assembler, "finalize")])
    assert status == -signal.SIGKILL
    feed(data.replace(b"e", b"a"))
    with pytest.raises(UserError, match="not what the interrupted run was given"):
        preprocess(piped)
    feed(data)
    preprocess(piped)
    assert output_bytes(piped)[".bin"] == expected[".bin"]
    assert output_bytes(piped)[".idx"] == expected[".idx"]
    assert (tmp_path / "out.rejected.jsonl").read_bytes().count(b"\n") == report.count(b"\n") == 1
