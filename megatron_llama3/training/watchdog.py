"""Notices that a run hangs, names the rank that the others wait for, and ends the job.

Every rank has two threads. One publishes in the job's key-value store, every few seconds, that the process lives and where its training
thread stands. The other sees when its own rank has made no step for --hang-timeout-seconds; since every step has collectives of all ranks,
all ranks see it at about the same time. A rank whose save or load moves bytes, that compiles, or that waits for storage to come back counts
that in the store, and all ranks take it for progress. The first to notice that there is none reads what the others published, and names

1. the ranks that no longer publish: stopped, swapped out, or on a dead host; else
2. those that are steps behind, or that do not wait in a collective while the others do.

Every rank leaves its last collectives beside the report (flight_recorder.py) and ends with RESTART_STATUS; a rank that cannot is left to
the launcher, which kills it.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import TrainingConfig
from megatron_llama3.parallel.groups import ParallelGroups
from megatron_llama3.parallel.torch_private import default_store
from megatron_llama3.training.events import EventLog
from megatron_llama3.training.flight_recorder import write_collectives
from megatron_llama3.training.progress import bytes_moved
from megatron_llama3.training.stop import RESTART_STATUS
from megatron_llama3.training.whereabouts import COMPILING, MOVING, STORAGE, Place, place_of_thread

NAMED_AT_MOST = 8


START_SHARE = 0.8
"""What else a start does (files, weights, first collectives) and compilation may take this share of the collectives' own limit: then the
rank is still named before they fail on the others."""


class Watchdog:
    """Made by the training thread of every rank (collective), which calls it after each step and each batch of an evaluation, and before
    it saves or loads."""

    def __init__(self, config: TrainingConfig, groups: ParallelGroups, events: EventLog):
        self.timeout, self.events = config.hang_timeout_seconds, events
        self.start_patience = max(self.timeout, START_SHARE * 60.0 * config.distributed_timeout_minutes)
        self.rank, self.world_size, self.on_gpu = groups.rank, dist.get_world_size(), groups.device.type == "cuda"
        self.interval = min(10.0, self.timeout / 5)
        self.thread = threading.get_ident()
        self.beats, self.iteration, self.last_beat = 0, 0, time.monotonic()
        self.tick, self.moved = 0, bytes_moved()
        self.signs, self.last_sign = 0, self.last_beat
        """of any rank's progress that is no step"""
        self.stopped = threading.Event()
        if not self.timeout or dist.get_backend() == "fake":
            return
        # A connection of its own: the default store's may be held by whoever waits for a key.
        self.store = dist.PrefixStore("watchdog", default_store().clone())
        self.hosts = _gather_hosts(groups)
        self._publish()
        dist.barrier(groups.control)
        for loop in (self._publish_loop, self._watch_loop):
            threading.Thread(target=loop, name="watchdog", daemon=True).start()

    def beat(self, iteration: int | None = None) -> None:
        """The training thread has come further."""
        self.beats += 1
        self.iteration = self.iteration if iteration is None else iteration
        self.last_beat = time.monotonic()

    def announce(self, phase: str) -> None:
        """Publishes what the training thread is about to do: one that stops in it at once would be seen in what came before."""
        if self.timeout and hasattr(self, "store"):
            with suppress(RuntimeError):  # as in the loop
                self._publish(phase)

    def stop(self) -> None:
        """Before ranks leave the job, each in its own time."""
        self.stopped.set()

    # --- the two threads ---

    def _publish_loop(self) -> None:
        while not self.stopped.wait(self.interval):
            self.tick += 1
            try:
                self._tell()
            except RuntimeError:
                return  # the store is gone with the rank or launcher that holds it; what follows from that is not this thread's business

    def _tell(self) -> None:
        if self._comes_further(self._publish()):
            self.store.add("signs", 1)

    def _publish(self, announced: str | None = None) -> Place:
        place = place_of_thread(self.thread, self.on_gpu)
        if announced is not None:
            place = place._replace(phase=announced, call="its beginning")
        status = {"tick": self.tick, "beats": self.beats, "iteration": self.iteration, "waits": place.is_waiting}
        self.store.set(str(self.rank), json.dumps(status | {"phase": place.phase, "call": place.call}))
        return place

    def _comes_further(self, place: Place) -> bool:
        """Whether this rank does something that is no hang, although it makes no step."""
        before, self.moved = self.moved, bytes_moved()
        if place.phase.endswith((STORAGE, *MOVING)):
            return place.phase.endswith(STORAGE) or self.moved > before
        is_starting = not self.beats and not place.is_waiting
        is_early = time.monotonic() - self.last_beat <= self.start_patience
        return is_early and (is_starting or place.phase.endswith(COMPILING))

    def _watch_loop(self) -> None:
        while not self.stopped.wait(self.interval):
            # Signs are looked for also while there is time: one that is seen late would count as given then.
            if time.monotonic() - self.last_beat > self.interval and self._idle_seconds() > self._limit():
                self._end()

    def _limit(self) -> float:
        """Seconds without progress that are a hang, here and now."""
        is_starting = not self.beats and not place_of_thread(self.thread, self.on_gpu).phase.endswith(MOVING)
        return self.start_patience if is_starting else self.timeout

    def _idle_seconds(self) -> float:
        """Since this rank made a step, or any rank gave another sign of progress."""
        signs = _in_thread(lambda: self.store.add("signs", 0), self.interval)
        if signs is not None and signs > self.signs:
            self.signs, self.last_sign = signs, time.monotonic()
        return time.monotonic() - max(self.last_beat, self.last_sign)

    # --- when it hangs ---

    def _end(self) -> None:
        """Whatever fails on the way, such as a store that is gone or a disk that is full, this process ends."""
        try:
            self._find_and_report()
            _in_thread(sys.stdout.flush, 1.0)  # its lock may be held by the thread that hangs
        finally:
            os._exit(RESTART_STATUS)

    def _find_and_report(self) -> None:
        _in_thread(self._write_collectives, 2 * self.interval)
        finder = _in_thread(self._is_first_to_notice, 3 * self.interval)
        if finder is None:  # the store does not answer: say so from the first rank that it is not on
            if self.rank == min(1, self.world_size - 1):
                self._report([self._store_owner()])
        elif finder:
            self._report(self._culprits())
            self.store.set("verdict", "")
            time.sleep(self.interval)  # in which the others see it
        else:
            _in_thread(self._wait_for_verdict, 12 * self.interval)

    def _write_collectives(self) -> None:
        write_collectives(self.events.folder, self.rank)

    def _is_first_to_notice(self) -> bool:
        return self.store.add("noticed", 1) == 1

    def _wait_for_verdict(self) -> None:
        """By asking: who waits in the store keeps the other thread from publishing."""
        while not self.store.check(["verdict"]):
            time.sleep(self.interval / 4)

    def _report(self, culprits: list[dict]) -> None:
        for culprit in culprits[:NAMED_AT_MOST]:
            where = f"{culprit['state']} in {culprit['phase']} ({culprit['call']}) after iteration {culprit['iteration']}"
            _to_stderr(f"hang: rank {culprit['rank']} on {culprit['host']} {where}; no step for {self.timeout:g} s, the job ends")
            _in_thread(lambda culprit=culprit: self._keep(culprit), 2 * self.interval)  # a file system may be what hangs
        if len(culprits) > NAMED_AT_MOST:
            _to_stderr(f"hang: and {len(culprits) - NAMED_AT_MOST} more ranks")

    def _keep(self, culprit: dict) -> None:
        with suppress(UserError):  # a full disk has no room for this
            self.events.add("hang", **culprit, noticed_by=self.rank)

    def _culprits(self) -> list[dict]:
        before = self._statuses()
        time.sleep(2.5 * self.interval)
        now = self._statuses()
        silent = [rank for rank in now if now[rank]["tick"] == before[rank]["tick"]]
        if silent:
            return [self._culprit(rank, now[rank] | {"iteration": self.iteration}, "does not answer, last seen") for rank in silent]
        least = min(status["beats"] for status in now.values())
        behind = [rank for rank, status in now.items() if status["beats"] == least]
        if len(behind) == self.world_size:  # all in the same step
            behind = [rank for rank, status in now.items() if not status["waits"]] or behind
        return [self._culprit(rank, now[rank], "is behind, it is") for rank in behind]

    def _statuses(self) -> dict[int, dict]:
        return dict(enumerate(map(json.loads, self.store.multi_get([str(rank) for rank in range(self.world_size)]))))

    def _culprit(self, rank: int, status: dict, state: str) -> dict:
        known = {key: status[key] for key in ("iteration", "phase", "call")}
        return {"rank": rank, "host": self.hosts[rank], "state": state} | known

    def _store_owner(self) -> dict:
        is_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        state = "does not answer (it, or the launcher there, holds the job's key-value store)" if is_launcher else "does not answer"
        phase = place_of_thread(self.thread, self.on_gpu).phase  # where this rank waits for it
        here = {"iteration": self.iteration, "phase": phase, "call": f"its store is silent; rank {self.rank} waits there"}
        return {"rank": 0, "host": self.hosts[0], "state": state} | here


def _gather_hosts(groups: ParallelGroups) -> list[str]:
    hosts: list = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname(), group=groups.control)
    return hosts


def _in_thread(function: Callable, seconds: float):
    """Its result, or None if it fails or has not come back in time."""
    results: list = []

    def run() -> None:
        try:
            results.append(function())
        except (RuntimeError, OSError):
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _to_stderr(line: str) -> None:
    """In one write, past buffers that a hung thread may hold."""
    os.write(2, (line + "\n").encode())
