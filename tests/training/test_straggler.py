"""Whose own work counts, and who is named slow."""

import threading
from types import SimpleNamespace

import pytest
import torch

from megatron_llama3.config.run import LoggingConfig, RunConfig
from megatron_llama3.training import straggler
from megatron_llama3.training.events import EventLog, read_lines
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.straggler import PROBE_REPEATS, SAMPLING_SECONDS, StragglerReport, slow_ranks
from megatron_llama3.training.whereabouts import Place


class Enough(Exception):
    pass


@pytest.fixture
def report(monkeypatch, tmp_path):
    """report(rank) of a job of three ranks whose sampling thread does not run."""
    monkeypatch.setattr(straggler.threading, "Thread", lambda **how: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(straggler.socket, "gethostname", lambda: "node7")

    def make(rank: int = 0) -> StragglerReport:
        run = RunConfig()
        run.logging.log_dir = str(tmp_path)
        groups = SimpleNamespace(rank=rank, control="control", device=torch.device("cpu"))
        return StragglerReport(LoggingConfig(straggler_interval=2, straggler_factor=1.5), groups, EventLog(run))

    return make


def gather_from(monkeypatch, worked: list[float]) -> list:
    """All ranks' seconds of own work a step; what this rank gave is added to the list that comes back."""
    given = []

    def all_gather_object(everywhere: list, here: tuple, group: str) -> None:
        given.append((here, group))
        everywhere[:] = [("node7", {"own work a step": seconds, "a fixed matrix product": 0.0}) for seconds in worked]

    monkeypatch.setattr(straggler, "dist", SimpleNamespace(get_world_size=lambda: len(worked), all_gather_object=all_gather_object))
    return given


def test_a_slow_rank_is_named_at_the_interval(report, monkeypatch, capsys, tmp_path):
    given = gather_from(monkeypatch, [0.5, 1.25, 0.5])
    reporter = report()
    assert (reporter.worked, reporter.steps) == (0.0, 0)
    for iteration, worked in ((1, 0.25), (2, 0.5), (3, 4.0)):
        reporter.worked += worked
        reporter(TrainState(iteration), None, False)
    assert given == [(("node7", {"own work a step": 0.375, "a fixed matrix product": 0.0}), "control")]
    assert (reporter.worked, reporter.steps) == (4.0, 1), "what came after the report is kept for the next"
    said = "rank 1 on node7 took 1.2500 s for own work a step, 2.50 x the median of all ranks"
    assert capsys.readouterr().out == f"straggler: iteration 2 | {said}\n"
    (event,) = read_lines(tmp_path / "events.jsonl")
    del event["time"]
    assert event == {
        **{"event": "straggler", "iteration": 2, "rank": 1, "host": "node7"}, "measure": "own work a step", "factor": 2.5,
    }  # fmt: skip


def test_rank_0_alone_names(report, monkeypatch, capsys):
    gather_from(monkeypatch, [0.5, 1.25, 0.5])
    report(rank=1)(TrainState(2), None, False)
    assert capsys.readouterr().out == ""


def test_only_work_in_a_training_step_counts(report, monkeypatch):
    """One second a look: in a step and working, in a step and waiting, between steps, twice in a step and working."""
    stands = ((False, True), (True, True), (False, False), (False, True), (False, True))
    places = [Place("", "", is_waiting, is_training) for is_waiting, is_training in stands]
    looks, clock, slept, asked = iter(places), iter(range(100)), [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > len(places):
            raise Enough

    monkeypatch.setattr(straggler, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=sleep))
    monkeypatch.setattr(straggler, "place_of_thread", lambda thread, on_gpu: asked.append((thread, on_gpu)) or next(looks))
    reporter = report()
    with pytest.raises(Enough):
        reporter._sample()
    assert reporter.worked == 3.0
    assert set(slept) == {SAMPLING_SECONDS}
    assert set(asked) == {(threading.get_ident(), False)}


def test_a_sampling_thread_is_started_that_ends_with_the_process(report, monkeypatch):
    started = []
    monkeypatch.setattr(straggler.threading, "Thread", lambda **how: SimpleNamespace(start=lambda: started.append(how)))
    reporter = report()
    assert started == [{"target": reporter._sample, "name": "straggler", "daemon": True}]


def test_slow_is_above_the_factor_times_the_median_of_each_measure():
    times = [{"work": 1.0, "product": 0.4}, {"work": 1.5, "product": 0.1}, {"work": 1.0, "product": 0.1}]
    assert slow_ranks(times, 1.5) == [(0, "product", 4.0)], "just at the factor is not slow"
    assert slow_ranks(times, 1.25) == [(1, "work", 1.5), (0, "product", 4.0)]
    assert slow_ranks([{"work": 0.001}, {"work": 0.001}, {"work": 0.008}], 1.5) == [(2, "work", 1.6)], "less than 5 ms is noise"


def test_the_probe_times_its_products_and_nothing_else(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait for the event")

        def elapsed_time(self, end) -> float:
            return 250.0

    class Matrix:
        def __matmul__(self, other) -> None:
            order.append("product")

    monkeypatch.setattr(straggler.torch, "cuda", SimpleNamespace(Event=Event, synchronize=lambda: order.append("wait for the queue")))
    monkeypatch.setattr(straggler, "PROBE_SIZE", 4)
    probe = straggler._Probe(torch.device("cpu"))
    assert (probe.matrix.shape, probe.matrix.dtype) == ((4, 4), torch.bfloat16)
    probe.matrix = Matrix()
    assert probe.seconds() == 0.25, "milliseconds became seconds"
    assert order == ["wait for the queue", "record", *["product"] * PROBE_REPEATS, "record", "wait for the event"]
