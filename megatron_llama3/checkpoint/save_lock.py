"""One run at a time writes into a --save folder: rank 0 holds `running.json` there, and says in it every few seconds that it lives.

A file that is made in one step and read by content works on NFS too, where locks and clocks of two machines cannot be relied on. A lock is
stale if its process is gone, on this machine, or has not counted on for `SILENCE_SECONDS`, on another one.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import patiently, user_error
from megatron_llama3.parallel.groups import ParallelGroups, said_by_rank_0

LOCK_FILE = "running.json"
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 30.0


class SaveLock:
    """Held by rank 0 of a run. Raises UserError where another run holds the folder, OSError where it cannot be written."""

    def __init__(self, save: Path):
        self.path, self.beats, self.lost = save / LOCK_FILE, 0, False
        self.owner = {"id": uuid.uuid4().hex, **_this_process(), "job": os.environ.get("SLURM_JOB_ID")}
        self.released = threading.Event()
        save.mkdir(parents=True, exist_ok=True)
        if not self._create():
            self._take_over(save)
        threading.Thread(target=self._beat_loop, name="save lock", daemon=True).start()

    def check(self) -> None:
        """Raises UserError if another run took the folder, as it may where this one was stopped for long."""
        if self.lost:
            other = _read(self.path) or {}
            raise UserError(f"--save {self.path.parent}: {_describe(other)} took it over while this run stood still; this one ends")

    def release(self) -> None:
        self.released.set()
        if not self.lost and self._is_mine():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether the file could be made; not if it is there."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(self.owner | {"beats": 0}, file)
        except OSError:
            self._remove(self.path)  # the next attempt would take an empty one for another run's
            raise
        return True

    def _take_over(self, save: Path) -> None:
        other = _read(self.path)
        if _is_alive(self.path, other):
            raise UserError(
                f"--save {save}: {_describe(other)} is writing into it: wait for its end, or name another folder "
                f"(if that run is gone, delete {self.path})"
            )
        self._write()
        time.sleep(0.5)  # of several that found it stale, the last one to write has it
        if not self._is_mine():
            raise UserError(f"--save {save}: another run has just started in it; name another folder")

    def _beat_loop(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file system that fails for a while; the next beat tries again
                self.lost = self._is_anothers()
                if self.lost:
                    return
                self._write()

    def _is_mine(self) -> bool:
        found = _read(self.path)
        return found is not None and found.get("id") == self.owner["id"]

    def _is_anothers(self) -> bool:
        """Not where the file is gone or cannot be read, as on a file system that fails for a while."""
        return (_read(self.path) or {}).get("id", self.owner["id"]) != self.owner["id"]

    def _write(self) -> None:
        self.beats += 1
        aside = self.path.with_name(f"{LOCK_FILE}.{self.owner['id']}")
        try:
            aside.write_text(json.dumps(self.owner | {"beats": self.beats}))
            os.replace(aside, self.path)
        except OSError:
            self._remove(aside)
            raise

    @staticmethod
    def _remove(path: Path) -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def held(save: str | None, groups: ParallelGroups, retry_minutes: float = 0) -> Iterator[SaveLock | None]:
    """The lock for the time of the block, on rank 0; None on others and without a --save. Collective; raises UserError on every rank, and
    StorageError where the file system failed for `retry_minutes`."""
    lock = None if save is None else patiently(lambda: said_by_rank_0(groups, lambda: _lock(save), False), retry_minutes, groups.rank == 0)
    try:
        yield lock
    finally:
        if lock is not None:
            with suppress(OSError):
                lock.release()


def _lock(save: str) -> SaveLock:
    try:
        return SaveLock(Path(save))
    except OSError as error:
        raise user_error(error, f"--save {save}: ") from error


def _read(path: Path) -> dict | None:
    """What the file says; {} where it is not whole, None where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(path: Path, owner: dict | None) -> bool:
    here = _this_process()
    if owner and all(owner.get(key) == here[key] for key in ("host", "namespace")):
        return owner.get("started") is not None and owner["started"] == _started(owner.get("pid"))
    before, deadline = owner, time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = _read(path)
        if now is not None and now != before:
            return True
    return False


def _this_process() -> dict:
    """Where and what it is; process numbers of two containers on one host are not comparable, and are used again."""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
        return {"host": socket.gethostname(), "namespace": namespace, "pid": os.getpid(), "started": _started(os.getpid())}
    return {"host": socket.gethostname(), "namespace": uuid.uuid4().hex, "pid": os.getpid(), "started": None}


def _started(pid: int | None) -> str | None:
    """When a process began, in the kernel's ticks; None where it is gone, or ended and not yet buried."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def _describe(owner: dict) -> str:
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return f"another run (process {owner.get('pid')} on {owner.get('host')}{job})"
