"""One run at a time in a --save folder; a lock whose run is gone holds nobody up."""

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from megatron_llama3.checkpoint import save_lock
from megatron_llama3.checkpoint.save_lock import LOCK_FILE, SaveLock
from megatron_llama3.config.errors import UserError


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(save_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(save_lock, "SILENCE_SECONDS", 2.5)


def owner_of(folder) -> dict:
    return json.loads((folder / LOCK_FILE).read_bytes())


def test_a_second_run_is_refused_with_the_first_ones_place(tmp_path):
    lock = SaveLock(tmp_path)
    with pytest.raises(UserError, match=rf"--save {tmp_path}: another run \(process {os.getpid()} on .*\) is writing into it"):
        SaveLock(tmp_path)
    lock.check()
    lock.release()
    assert not (tmp_path / LOCK_FILE).exists()
    SaveLock(tmp_path).release()


def test_a_killed_run_on_this_machine_holds_nothing(tmp_path):
    program = (
        "import sys, pathlib, os\n"
        "from megatron_llama3.checkpoint.save_lock import SaveLock\n"
        "SaveLock(pathlib.Path(sys.argv[1]))\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == 9
    lock = SaveLock(tmp_path)
    assert owner_of(tmp_path)["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_run_elsewhere_is_alive_while_its_file_changes(tmp_path, is_alive):
    path = tmp_path / LOCK_FILE
    stopped = threading.Event()

    def beat():
        beats = 0
        while not stopped.wait(0.2):
            beats += is_alive
            path.write_text(json.dumps({"id": "x", "host": "elsewhere", "pid": 1, "job": "77", "beats": beats}))

    path.write_text(json.dumps({"id": "x", "host": "elsewhere", "pid": 1, "job": "77", "beats": 0}))
    thread = threading.Thread(target=beat)
    thread.start()
    if is_alive:
        with pytest.raises(UserError, match="process 1 on elsewhere, Slurm job 77"):
            SaveLock(tmp_path)
    stopped.set()
    thread.join()
    SaveLock(tmp_path).release()


def test_half_a_file_is_stale(tmp_path):
    (tmp_path / LOCK_FILE).write_text('{"id": ')
    SaveLock(tmp_path).release()


def test_a_run_that_stood_still_gives_way_to_the_one_that_took_over(tmp_path):
    lock = SaveLock(tmp_path)
    (tmp_path / LOCK_FILE).write_text(json.dumps({"id": "y", "host": "elsewhere", "pid": 2}))
    deadline = threading.Event()
    while not lock.lost:
        deadline.wait(0.1)
    with pytest.raises(UserError, match=r"process 2 on elsewhere.* took it over"):
        lock.check()
    lock.release()
    assert owner_of(tmp_path)["id"] == "y"


def test_only_rank_0_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(save_lock, "said_by_rank_0", lambda groups, answer, is_shared: answer() if groups.rank == 0 else None)
    with save_lock.held(str(tmp_path / "new"), SimpleNamespace(rank=1)) as lock:
        assert lock is None
    with save_lock.held(str(tmp_path / "new"), SimpleNamespace(rank=0)) as lock:
        assert owner_of(tmp_path / "new")["id"] == lock.owner["id"]
    assert not (tmp_path / "new" / LOCK_FILE).exists()
    with save_lock.held(None, SimpleNamespace(rank=0)) as lock:
        assert lock is None
