"""The watchdog without a hang: when it ends the job, whom it names, and how it ends where nothing answers any more."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig, TrainingConfig
from megatron_llama3.training import watchdog as module
from megatron_llama3.training.events import EventLog, read_lines
from megatron_llama3.training.stop import RESTART_STATUS
from megatron_llama3.training.watchdog import Watchdog, _in_thread
from megatron_llama3.training.whereabouts import Place

HOSTS = ["node0", "node1", "node2", "node3"]


class Clock:
    """Seconds that pass only where somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        assert self.now < 1000, "waits for ever"


class Looks:
    """An event that is set after `count` looks; each look lets `clock` go on by the seconds waited."""

    def __init__(self, clock: Clock, count: int):
        self.clock, self.count, self.waited = clock, count, []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        self.clock.now += seconds
        return len(self.waited) > self.count


@pytest.fixture
def started(monkeypatch):
    """What threads were started with; none runs."""
    found = []
    monkeypatch.setattr(module.threading, "Thread", lambda **how: SimpleNamespace(start=lambda: found.append(how)))
    return found


@pytest.fixture
def watch(monkeypatch, started, tmp_path):
    """watch(timeout in s, rank, ranks, a collective's limit in minutes) -> a watchdog whose threads do not run, and its clock."""

    def make(timeout: float = 10.0, rank: int = 1, ranks: int = 4, minutes: int = 10, backend: str = "gloo") -> tuple[Watchdog, Clock]:
        clock, store = Clock(), dist.HashStore()

        def all_gather_object(hosts: list, host: str, group: str) -> None:
            assert (len(hosts), host, group) == (ranks, "here", "control")
            hosts[:] = HOSTS[:ranks]

        def barrier(group: str) -> None:
            assert (group, store.check([f"watchdog/{rank}"])) == ("control", True), "every rank has a status before the first looks"
            met.append(group)

        met: list[str] = []
        fake = {"get_world_size": lambda: ranks, "get_backend": lambda: backend, "barrier": barrier}
        fake |= {"all_gather_object": all_gather_object, "PrefixStore": dist.PrefixStore}
        monkeypatch.setattr(module, "default_store", lambda: SimpleNamespace(clone=lambda: store))
        monkeypatch.setattr(module, "dist", SimpleNamespace(**fake))
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(module.socket, "gethostname", lambda: "here")
        run = RunConfig()
        run.logging.log_dir = str(tmp_path)
        config = TrainingConfig(hang_timeout_seconds=timeout, distributed_timeout_minutes=minutes)
        groups = SimpleNamespace(rank=rank, control="control", device=torch.device("cpu"))
        dog = Watchdog(config, groups, EventLog(run))
        assert len(met) == len(started) // 2
        return dog, clock

    return make


def stands_in(monkeypatch, phase: str, call: str = "all_reduce", is_waiting: bool = True) -> None:
    monkeypatch.setattr(module, "place_of_thread", lambda thread, on_gpu: Place(phase, call, is_waiting))


def published(dog: Watchdog, rank: int) -> dict:
    return json.loads(dog.store.get(str(rank)))


def publish(dog: Watchdog, rank: int, tick: int = 1, beats: int = 7, waits: bool = True) -> None:
    status = {"tick": tick, "beats": beats, "iteration": beats + 100, "waits": waits, "phase": "forward", "call": f"call {rank}"}
    dog.store.set(str(rank), json.dumps(status))


# --- what it is made of ---


@pytest.mark.parametrize("timeout, minutes, patience", [(5.0, 10, 480.0), (900.0, 10, 900.0), (0.5, 1, 48.0)])
def test_a_start_may_take_most_of_the_collectives_limit(watch, timeout, minutes, patience):
    assert watch(timeout, minutes=minutes)[0].start_patience == patience


@pytest.mark.parametrize("timeout, interval", [(5.0, 1.0), (50.0, 10.0), (300.0, 10.0), (2.0, 0.4)])
def test_it_looks_five_times_in_the_limit_and_at_least_every_ten_seconds(watch, timeout, interval):
    assert watch(timeout)[0].interval == interval


def test_it_has_two_threads_that_end_with_the_process(watch, started):
    dog, _ = watch()
    assert started == [{"target": loop, "name": "watchdog", "daemon": True} for loop in (dog._publish_loop, dog._watch_loop)]
    assert (dog.thread, dog.hosts, dog.rank, dog.world_size, dog.on_gpu) == (threading.get_ident(), HOSTS, 1, 4, False)
    assert published(dog, 1)["tick"] == 0


@pytest.mark.parametrize("kind", [{"timeout": 0.0}, {"backend": "fake"}])
def test_it_does_nothing_without_a_limit_or_other_ranks(watch, started, kind):
    dog, _ = watch(**kind)
    dog.beat(3)
    assert started == []
    assert not hasattr(dog, "store")


def test_a_beat_counts_and_an_evaluation_stays_at_its_iteration(watch):
    dog, clock = watch()
    clock.now = 3.0
    dog.beat(8)
    dog.beat()
    assert (dog.beats, dog.iteration, dog.last_beat) == (2, 8, 3.0)
    dog.beat(9)
    assert (dog.beats, dog.iteration) == (3, 9)
    assert not dog.stopped.is_set()
    dog.stop()
    assert dog.stopped.is_set()


def test_what_a_rank_publishes(watch, monkeypatch):
    dog, _ = watch(rank=2)
    dog.beat(31)
    stands_in(monkeypatch, "gradient norm", "all_reduce in clip", True)
    dog.tick = 5
    dog._publish()
    here = {"phase": "gradient norm", "call": "all_reduce in clip"}
    assert published(dog, 2) == {"tick": 5, "beats": 1, "iteration": 31, "waits": True} | here


def test_it_publishes_at_every_interval_until_the_store_is_gone(watch, monkeypatch):
    dog, clock = watch(timeout=10.0)
    dog.stopped = Looks(clock, 3)
    ticks = []
    monkeypatch.setattr(dog, "_tell", lambda: ticks.append(dog.tick))
    dog._publish_loop()
    assert (ticks, dog.stopped.waited) == ([1, 2, 3], [2.0] * 4)

    def fails() -> None:
        ticks.append(dog.tick)
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(dog, "_tell", fails)
    dog.stopped = Looks(clock, 3)
    dog._publish_loop()
    assert ticks == [1, 2, 3, 4]


# --- when it ends the job ---


def ends_after(dog: Watchdog, clock: Clock, monkeypatch, looks: int) -> list[float]:
    """Idle seconds at each look at which it would have ended the job."""
    ended = []
    monkeypatch.setattr(dog, "_end", lambda: ended.append(clock.now - dog.last_beat))
    dog.stopped = Looks(clock, looks)
    dog._watch_loop()
    return ended


def trained(dog: Watchdog) -> Watchdog:
    dog.beat(1)
    return dog


def test_a_rank_that_is_idle_for_longer_than_the_limit_ends(watch, monkeypatch, at_once):
    dog, clock = watch(timeout=5.0)
    stands_in(monkeypatch, "forward and backward")
    assert ends_after(trained(dog), clock, monkeypatch, 7) == [6.0, 7.0], "not yet at 5.0"


def test_a_beat_starts_the_time_anew(watch, monkeypatch, at_once):
    dog, clock = watch(timeout=5.0)
    stands_in(monkeypatch, "forward and backward")
    assert ends_after(trained(dog), clock, monkeypatch, 4) == []
    dog.beat(1)
    assert ends_after(dog, clock, monkeypatch, 5) == []


def test_before_the_first_step_it_has_the_patience_of_a_start(watch, monkeypatch, at_once):
    dog, clock = watch(timeout=30.0, minutes=1)  # it looks every 6 s
    stands_in(monkeypatch, "forward and backward")
    assert ends_after(dog, clock, monkeypatch, 9) == [54.0]


@pytest.mark.parametrize("phase", ["loading a checkpoint", "save", "rolling back, waiting for a save"])
def test_a_load_or_save_has_none_where_nothing_moves(watch, monkeypatch, at_once, phase):
    dog, clock = watch(timeout=30.0, minutes=10)
    stands_in(monkeypatch, phase)
    assert ends_after(dog, clock, monkeypatch, 6) == [36.0]


def test_it_lasts_as_long_as_any_rank_gives_a_sign(watch, monkeypatch, at_once):
    dog, clock = watch(timeout=5.0)
    stands_in(monkeypatch, "save")
    signs = iter([0, 1, 1, 1, 1, 2, *[2] * 9])
    dog.store = SimpleNamespace(add=lambda key, count: next(signs) if (key, count) == ("signs", 0) else 0)
    # Looked at from 2 s on, every second: signs at 3 and at 7, then silence.
    assert ends_after(trained(dog), clock, monkeypatch, 13) == [13.0]


@pytest.mark.parametrize(
    "phase, moves, has_trained, waits, gives",
    [
        *(("save", True, True, True, True), ("save", False, True, False, False), ("loading a checkpoint", True, False, False, True)),
        *(("loading a checkpoint", False, False, True, False), ("loading a checkpoint, waiting for storage", False, False, False, True)),
        *(("forward and backward", True, True, False, False), ("forward and backward, compiling", False, True, False, True)),
        *(("between phases", False, False, False, True), ("between phases", False, False, True, False)),
    ],
)
def test_what_is_a_sign_of_progress(watch, monkeypatch, phase, moves, has_trained, waits, gives):
    dog, clock = watch(timeout=5.0, minutes=1)
    if has_trained:
        dog.beat(1)
    stands_in(monkeypatch, phase, is_waiting=waits)
    monkeypatch.setattr(module, "bytes_moved", lambda: dog.moved + moves)
    before = dog.store.add("signs", 0)
    dog._tell()
    assert dog.store.add("signs", 0) - before == gives
    clock.now = 49.0  # and no longer than a start may take
    dog._tell()
    assert dog.store.add("signs", 0) - before == gives * (2 if moves or phase.endswith("storage") else 1)


def test_a_phase_is_announced_before_it_begins(watch, monkeypatch):
    dog, _ = watch(rank=2)
    stands_in(monkeypatch, "between phases", "hook (hooks.py:9)", False)
    dog.announce("save")
    assert published(dog, 2) == {"tick": 0, "beats": 0, "iteration": 0, "waits": False, "phase": "save", "call": "its beginning"}


def test_without_a_limit_nothing_is_announced(watch):
    watch(timeout=0.0)[0].announce("save")


# --- whom it names ---


def culprits(dog: Watchdog, clock: Clock, during=lambda: None) -> list[dict]:
    """`during` happens while it waits between its two looks at all ranks."""
    sleep = clock.sleep
    clock.sleep = lambda seconds: (during(), sleep(seconds))
    try:
        return dog._culprits()
    finally:
        clock.sleep = sleep


def test_a_rank_that_publishes_no_more_is_named_first(watch):
    dog, clock = watch()
    dog.beat(41)
    for rank in range(4):
        publish(dog, rank, beats=7 - rank)

    def others_go_on() -> None:
        for rank in (0, 1, 3):
            publish(dog, rank, tick=2, beats=7 - rank)

    (found,) = culprits(dog, clock, others_go_on)
    assert clock.slept == [5.0], "two intervals of 2 s fit into it"
    where = {"phase": "forward", "call": "call 2", "iteration": 41}  # its own status is old, so the iteration is that of who saw it
    assert found == {"rank": 2, "host": "node2", "state": "does not answer, last seen"} | where


@pytest.mark.parametrize(
    "beats, waits, named",
    [
        ((7, 7, 6, 7), (True, True, True, True), [2]),
        ((7, 6, 6, 7), (False, True, True, True), [1, 2]),
        ((7, 7, 7, 7), (True, False, True, False), [1, 3]),
        ((7, 7, 7, 7), (True, True, True, True), [0, 1, 2, 3]),
    ],
    ids=["one step behind", "two are behind", "two do not wait", "all wait"],
)
def test_of_ranks_that_answer_those_behind_are_named(watch, beats, waits, named):
    dog, clock = watch()

    def all_publish(tick: int) -> None:
        for rank in range(4):
            publish(dog, rank, tick, beats[rank], waits[rank])

    all_publish(1)
    found = culprits(dog, clock, lambda: all_publish(2))
    assert found == [
        {"rank": r, "host": HOSTS[r], "state": "is behind, it is", "iteration": beats[r] + 100, "phase": "forward", "call": f"call {r}"}
        for r in named
    ]


def test_each_culprit_is_a_line_and_an_event_and_many_are_counted(watch, at_once, capfd, tmp_path):
    dog, _ = watch(timeout=7.5)
    culprit = {"host": "node3", "state": "is behind, it is", "iteration": 12, "phase": "save", "call": "fsync (store.py:9)"}
    dog._report([{"rank": rank} | culprit for rank in range(10)])
    lines = capfd.readouterr().err.splitlines()
    said = "on node3 is behind, it is in save (fsync (store.py:9)) after iteration 12; no step for 7.5 s, the job ends"
    assert lines == [*(f"hang: rank {rank} {said}" for rank in range(8)), "hang: and 2 more ranks"]
    events = read_lines(tmp_path / "events.jsonl")
    assert [(e["event"], e["rank"], e["noticed_by"], e["phase"]) for e in events] == [("hang", rank, 1, "save") for rank in range(8)]
    dog._report([{"rank": rank} | culprit for rank in range(8)])
    assert len(capfd.readouterr().err.splitlines()) == 8


def test_a_full_disk_keeps_no_culprit_from_being_named(watch, at_once, monkeypatch, capfd):
    dog, _ = watch()

    def add(*_, **__):
        raise UserError("events.jsonl: could not be written: No space left on device")

    monkeypatch.setattr(dog.events, "add", add)
    dog._report([{"rank": rank, "host": "n", "state": "s", "iteration": 1, "phase": "p", "call": "c"} for rank in range(2)])
    assert len(capfd.readouterr().err.splitlines()) == 2


# --- how it ends ---


@pytest.fixture
def at_once(monkeypatch):
    """Functions of _in_thread run here; the seconds that each was given are returned."""
    given = {}

    def call(function, seconds: float):
        given[function.__name__] = seconds
        return function()

    monkeypatch.setattr(module, "_in_thread", call)
    return given


def test_the_first_to_notice_names_and_the_others_wait_for_its_verdict(watch, monkeypatch, at_once):
    dog, clock = watch()
    reported = []
    monkeypatch.setattr(dog, "_culprits", lambda: [{"rank": 3}])
    monkeypatch.setattr(dog, "_report", lambda found: reported.append((found, dog.store.check(["verdict"]))))
    dog._find_and_report()
    assert reported == [([{"rank": 3}], False)]
    assert dog.store.check(["verdict"])
    assert clock.slept == [2.0], "in which the others see it"
    dog._find_and_report()
    assert len(reported) == 1
    assert at_once == {"_write_collectives": 4.0, "_is_first_to_notice": 6.0, "_wait_for_verdict": 24.0}, "by an interval of 2 s"


def test_a_verdict_is_asked_for_four_times_an_interval(watch):
    dog, clock = watch()
    sleep = clock.sleep

    def until_the_third(seconds: float) -> None:
        sleep(seconds)
        if len(clock.slept) == 3:
            dog.store.set("verdict", "")

    clock.sleep = until_the_third
    dog._wait_for_verdict()
    assert clock.slept == [0.5] * 3


@pytest.mark.parametrize("rank, ranks, speaks", [(0, 4, False), (1, 4, True), (2, 4, False), (0, 1, True)])
@pytest.mark.parametrize("agent", ["True", "False"])
def test_a_store_that_is_silent_is_told_by_the_first_rank_that_it_is_not_on(watch, monkeypatch, rank, ranks, speaks, agent):
    dog, _ = watch(rank=rank, ranks=ranks)
    dog.beat(17)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.setattr(module, "_in_thread", lambda function, seconds: None)
    stands_in(monkeypatch, "save")
    reported = []
    monkeypatch.setattr(dog, "_report", reported.extend)
    dog._find_and_report()
    state = "does not answer" + " (it, or the launcher there, holds the job's key-value store)" * (agent == "True")
    where = {"iteration": 17, "phase": "save", "call": f"its store is silent; rank {rank} waits there"}
    assert reported == ([{"rank": 0, "host": "node0", "state": state} | where] if speaks else [])


@pytest.mark.parametrize("outcome", [None, RuntimeError("the store is gone"), OSError(28, "No space left on device")])
def test_the_process_ends_whatever_fails_on_the_way(watch, monkeypatch, outcome):
    class Ended(BaseException):
        pass

    def exit_now(status: int) -> None:
        raise Ended(status)

    def find() -> None:
        if outcome is not None:
            raise outcome

    dog, _ = watch()
    flushed = []
    monkeypatch.setattr(module, "_in_thread", lambda function, seconds: flushed.append((function.__name__, seconds)))
    monkeypatch.setattr(dog, "_find_and_report", find)
    monkeypatch.setattr(module.os, "_exit", exit_now)
    with pytest.raises(Ended) as caught:
        dog._end()
    monkeypatch.undo()
    assert caught.value.args == (RESTART_STATUS,) == (75,)
    assert flushed == ([("flush", 1.0)] if outcome is None else [])


def test_a_call_that_fails_or_takes_too_long_has_no_result():
    def fails(error: Exception) -> None:
        raise error

    release = threading.Event()
    assert _in_thread(lambda: "answer", 60.0) == "answer"
    assert _in_thread(lambda: time.sleep(0.1) or "late", 60.0) == "late"
    assert _in_thread(lambda: fails(RuntimeError("gone")), 60.0) is None
    assert _in_thread(lambda: fails(OSError(28, "full")), 60.0) is None
    assert _in_thread(lambda: release.wait(60.0), 0.01) is None
    release.set()
