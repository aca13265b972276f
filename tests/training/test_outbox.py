"""What a run writes about itself comes through a file system that fails for a while: all of it, once, in order."""

import errno
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.training import outbox as module
from megatron_llama3.training.outbox import Outbox


class Storage:
    """Takes items unless `error` is set; a clock that only sleeping moves."""

    def __init__(self, monkeypatch):
        self.taken, self.tries, self.error, self.now, self.blocks = [], 0, None, 0.0, 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(module, "await_storage", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def write(self, item) -> None:
        self.tries += 1
        self.now += self.blocks
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error), "metrics.jsonl")
        self.taken.append(item)


@pytest.fixture
def storage(monkeypatch) -> Storage:
    return Storage(monkeypatch)


def test_items_wait_and_come_in_order_and_it_is_said_once(storage, capsys):
    box = Outbox("metrics.jsonl", storage.write)
    box.add(0)
    storage.error = errno.EROFS
    for item in range(1, 6):
        box.add(item)
        storage.now += 0.1
    assert (storage.taken, storage.tries) == ([0], 2), "it is left alone for a second"
    storage.error, storage.now = None, storage.now + 1
    box.add(6)
    box.add(7)
    assert storage.taken == list(range(8))
    assert capsys.readouterr().err.splitlines() == [
        "metrics.jsonl: could not be written: metrics.jsonl: Read-only file system; its entries are kept in memory until it can be",
        "metrics.jsonl: can be written again; 6 entries came late",
    ]


def test_attempts_become_rarer_and_take_a_tenth_of_the_time_at_most(storage):
    box = Outbox("events.jsonl", storage.write)
    box.has_written, storage.error = True, errno.EACCES  # what worked before may work again
    tried = []
    for step in range(1000):
        before = storage.tries
        box.add(step)
        tried += [storage.now] * (storage.tries > before)
        storage.now += 0.5
    assert [later - earlier for earlier, later in pairwise(tried)][:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert tried[-1] - tried[-2] == 30.0
    storage.blocks, storage.now = 60.0, storage.now + 30
    box.add(0)
    assert box.next_try == storage.now + 600


def test_a_folder_that_may_not_be_written_is_refused_before_the_run(storage):
    storage.error = errno.EACCES
    with pytest.raises(UserError, match=r"^metrics\.jsonl: could not be written: metrics\.jsonl: Permission denied$"):
        Outbox("metrics.jsonl", storage.write).add(1)
    storage.error = errno.ESTALE
    Outbox("metrics.jsonl", storage.write).add(1)


def test_at_the_end_it_tries_for_a_minute(storage, capsys):
    box = Outbox("metrics.jsonl", storage.write)
    storage.error = errno.EIO
    box.add(1)
    box.add(2)
    box.close()
    assert storage.now == 60.0
    assert capsys.readouterr().err.splitlines()[-1] == "metrics.jsonl: 2 entries are lost"
    storage.error = None
    box.close()
    assert (storage.taken, storage.now) == ([1, 2], 60.0)


def test_memory_is_bounded_and_the_newest_stay(storage, monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    box = Outbox("metrics.jsonl", storage.write)
    storage.error = errno.EIO
    for item in range(9):
        box.add(item)
    storage.error = None
    box.flush()
    assert storage.taken == [6, 7, 8]
