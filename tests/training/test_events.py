"""What a run keeps of what happened to it, and how it tells where it stands."""

import json
import math
import resource
import threading
import time

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.training.events import EventLog, append_line, read_lines, read_metrics
from megatron_llama3.training.failures import has_lost_contact, noted_failures
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.straggler import slow_ranks
from megatron_llama3.training.whereabouts import place_of_error, place_of_thread

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53386. This is typically"


def test_what_a_start_did_again_takes_the_place_of_what_a_crashed_one_wrote(tmp_path):
    before, lost = [(4, "loss", 3.0), (4, "validation_loss", 3.1)], [(5, "loss", 9.0), (6, "loss", 9.0), (6, "validation_loss", 9.0)]
    for iteration, key, value in [*before, *lost, (5, "loss", 2.0), (7, "loss", 1.0)]:
        append_line(tmp_path / "metrics.jsonl", {"iteration": iteration, key: value})
    found = [(record["iteration"], *list(record.items())[1]) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [(4, "loss", 3.0), (4, "validation_loss", 3.1), (5, "loss", 2.0), (7, "loss", 1.0)]


def test_a_torn_line_is_ended_and_passed_over(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    append_line(path, {"event": "start"})
    with path.open("a") as file:
        file.write('{"event": "sa')
    append_line(path, {"event": "stop", "loss": math.nan, "norm": math.inf})
    assert read_lines(path) == [{"event": "start"}, {"event": "stop", "loss": "nan", "norm": "inf"}]
    assert path.read_text().count("\n") == 3
    assert read_lines(tmp_path / "none") == []


def test_a_line_that_is_written_in_part_is_an_error(tmp_path):
    """As on a disk that fills up, which takes what it has room for and says nothing."""
    path = tmp_path / "events.jsonl"
    append_line(path, {"event": "start"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        with pytest.raises(UserError, match=r"events\.jsonl: could not be written: No space left"):
            append_line(path, {"event": "stop"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_line(path, {"event": "stop"})
    assert read_lines(path) == [{"event": "start"}, {"event": "stop"}]


def test_no_folder_no_events(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    EventLog(RunConfig()).add("start")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_what_ends_a_run_is_noted_once(tmp_path, rank):
    config = RunConfig()
    config.logging.log_dir = str(tmp_path)
    events = EventLog(config)
    for error in (RuntimeError(GLOO), UserError("--save: no space left")):
        with pytest.raises(type(error)), noted_failures(events, TrainState(iteration=3), rank):
            raise error
    found = [(e["event"], e["rank"], e["iteration"], e["reason"]) for e in read_lines(tmp_path / "events.jsonl")]
    own = ("failure", rank, 3, "--save: no space left")
    assert found == ([("failure", 0, 3, "another rank was lost"), own] if rank == 0 else [own])


def test_a_lost_rank_is_told_from_a_fault_of_the_program():
    def wrapped(error: Exception) -> UserError:
        try:
            raise UserError("checkpoint could not be written") from error
        except UserError as outer:
            return outer

    assert has_lost_contact(RuntimeError(GLOO))
    assert has_lost_contact(wrapped(RuntimeError(GLOO)))
    for other in (RuntimeError("Cannot use ReduceOp.PREMUL_SUM with Gloo"), ValueError(GLOO), wrapped(OSError("no space left"))):
        assert not has_lost_contact(other)


def test_where_a_thread_stands():
    release = threading.Event()

    def sleeps_here() -> None:
        release.wait(60)

    def train_step() -> None:
        sleeps_here()

    thread = threading.Thread(target=train_step)
    thread.start()
    time.sleep(0.1)
    place = place_of_thread(thread.ident)
    release.set()
    thread.join()
    assert "(threading.py" in place.call
    assert (place.is_training, place.is_waiting) == (True, False)
    assert place_of_thread(thread.ident).phase == "not running"


def test_where_an_error_came_from():
    def fails() -> None:
        json.loads("{")

    with pytest.raises(ValueError) as caught:
        fails()
    assert "raw_decode (decoder.py" in str(place_of_error(caught.value))


def test_slow_ranks_are_those_above_the_median():
    times = [{"own work": 1.0, "product": 0.1}, {"own work": 1.1, "product": 0.1}, {"own work": 2.2, "product": 0.1}]
    assert slow_ranks(times, 1.5) == [(2, "own work", 2.0)]
    assert slow_ranks(times, 2.5) == []
    assert slow_ranks([{"own work": 0.0}, {"own work": 0.004}], 1.5) == []
