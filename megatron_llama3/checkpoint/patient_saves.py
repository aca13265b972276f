"""Saves that outlast a file system which fails for a while: one that could not be written is tried again at the next step, then less and
less often; training goes on meanwhile. After --storage-retry-minutes without a save that worked the run ends with status 75.

Ranks fail together (store.py), so each counts the same failures and waits the same time.
"""

import time
from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.distributed as dist

from megatron_llama3.checkpoint.store import CheckpointWriter
from megatron_llama3.config.storage import StorageError, await_storage, waits
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.training.state import TrainState

HURRIED_SECONDS = 120.0
"""For the last save of a run that a signal ends: Slurm kills at the time limit, five minutes after it, what has not ended by then."""


class PatientSaves:
    """Of one run; every rank has one and calls it at the same iterations, and each call is collective. All raise StorageError when the last
    attempt failed.

    `on_failure(state, reason, attempt)` hears of each save that could not be written; `is_hurried()` says whether a signal ends the run
    (collective).
    """

    def __init__(self, writer: CheckpointWriter, minutes: float, is_hurried: Callable[[], bool], on_failure: Callable):
        self.writer, self.minutes, self.is_hurried, self.on_failure = writer, minutes, is_hurried, on_failure
        self.failures = 0
        """in a row"""
        self.waits: Iterator[float] = iter(())
        self.next_wait, self.next_try = 0.0, 0.0

    def check(self, state: TrainState) -> None:
        """Between steps: notes how a save in the background has ended, if it has."""
        if self.writer.pending is not None:
            self._attempt(state, self.writer.check)

    def is_retry_due(self) -> bool:
        """Whether a save that failed is to be tried again at this step."""
        if not self.failures or self.writer.pending is not None:
            return False
        is_due = torch.tensor(int(time.monotonic() >= self.next_try))
        dist.all_reduce(is_due, dist.ReduceOp.MAX, group=self.writer.engine.groups.control)
        return bool(is_due)

    def save(self, state: TrainState, stream: TrainingStream) -> bool:
        """Begins a save; whether it could."""
        return self._attempt(state, lambda: self.writer.save(state, stream))

    def wait(self, state: TrainState) -> bool:
        """Until no save is under way; whether the last one is on disk."""
        return not self.failures if self.writer.pending is None else self._attempt(state, self.writer.wait)

    def save_last(self, state: TrainState, stream: TrainingStream) -> bool:
        """Until the run's last save is on disk, which it then is."""
        hurried = 0.0
        while not (self.save(state, stream) and self.wait(state)):
            hurried += self.next_wait if self.is_hurried() else 0.0
            if hurried > HURRIED_SECONDS:
                raise StorageError(f"--save {self.writer.folder}: no checkpoint could be written in the time that a signal leaves")
            await_storage(self.next_wait)
        return True

    def _attempt(self, state: TrainState, action: Callable[[], None]) -> bool:
        """Whether `action` brought no failure; one is noted, and the next attempt planned."""
        try:
            action()
        except StorageError as error:
            self._plan_next(error)
            self.on_failure(state, str(error), self.failures)
            return False
        if self.writer.pending is None:
            self.failures = 0
        return True

    def _plan_next(self, error: StorageError) -> None:
        if not self.failures:
            self.waits = chain([0.0], waits(self.minutes)) if self.minutes else iter(())
        self.failures += 1
        wait = next(self.waits, None)
        if wait is None:
            raise error
        self.next_wait, self.next_try = wait, time.monotonic() + wait
