"""A save that fails is tried again, at the next step and then less often, until it works or the time is over."""

from types import SimpleNamespace

import pytest

from megatron_llama3.checkpoint import patient_saves as module
from megatron_llama3.checkpoint.patient_saves import PatientSaves
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import StorageError
from megatron_llama3.training.state import TrainState


class Writer:
    """Each save ends as `outcomes` says: in the background (None or an error at its end), or an error at its beginning."""

    folder = "run"

    def __init__(self):
        self.outcomes, self.pending, self.begun = [], None, 0
        self.engine = SimpleNamespace(groups=SimpleNamespace(control=None))

    def save(self, state, stream) -> None:
        self.wait()
        self.begun += 1
        kind, error = self.outcomes.pop(0) if self.outcomes else ("end", None)
        if kind == "begin":
            raise error
        self.pending = (error,)

    def wait(self) -> None:
        if self.pending is not None:
            (error,), self.pending = self.pending, None
            if error is not None:
                raise error

    check = wait


@pytest.fixture
def saves(monkeypatch):
    clock = SimpleNamespace(now=0.0, hurried=False, failures=[])

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(module, "await_storage", sleep)
    monkeypatch.setattr(module, "dist", SimpleNamespace(all_reduce=lambda *args, **kwargs: None, ReduceOp=SimpleNamespace(MAX=0)))
    made = PatientSaves(Writer(), 1.0, lambda: clock.hurried, lambda state, *said: clock.failures.append((state.iteration, *said)))
    made.clock = clock
    return made


def failed(what: str = "end") -> tuple[str, StorageError]:
    return what, StorageError("full")


def test_a_failed_save_is_noted_and_due_at_the_next_step_and_then_after_a_while(saves):
    saves.writer.outcomes = [failed(), failed(), failed("begin"), ("end", None)]
    assert not saves.is_retry_due()
    begun = []
    for step in range(1, 60):
        state = TrainState(iteration=step)
        saves.check(state)
        if step == 2 or saves.is_retry_due():
            begun.append((step, saves.save(state, None)))
        saves.clock.now += 0.5
    assert begun == [(2, True), (3, True), (6, False), (10, True)]
    assert saves.clock.failures == [(3, "full", 1), (4, "full", 2), (6, "full", 3)]
    assert saves.failures == 0
    saves.writer.outcomes = [failed()]
    saves.save(TrainState(iteration=80), None)
    saves.check(TrainState(iteration=81))
    assert saves.clock.failures[-1] == (81, "full", 1), "it counts anew"


def test_after_the_last_attempt_it_raises(saves):
    saves.writer.outcomes = [failed("begin")] * 100

    def steps() -> None:
        for step in range(1000):
            if step == 0 or saves.is_retry_due():
                saves.save(TrainState(iteration=step), None)
            saves.clock.now += 0.25

    with pytest.raises(StorageError, match="full"):
        steps()
    assert 60 <= saves.clock.now < 66
    assert len(saves.clock.failures) == 7, "at 0, 0, 1, 3, 7, 15 and 31 s; the eighth, a minute after the first, is the last"


def test_without_patience_the_first_failure_ends_the_run(saves):
    saves.minutes = 0.0
    saves.writer.outcomes = [failed("begin")]
    with pytest.raises(StorageError):
        saves.save(TrainState(), None)
    assert saves.clock.failures == []


def test_the_last_save_is_tried_until_it_is_on_disk(saves):
    saves.writer.outcomes = [failed("begin"), failed(), failed(), ("end", None)]
    assert saves.save_last(TrainState(iteration=9), None)
    assert (saves.writer.begun, saves.writer.pending, saves.clock.now) == (4, None, 3.0)


def test_after_a_signal_it_gives_up_in_time(saves):
    saves.minutes, saves.clock.hurried = 60.0, True
    saves.writer.outcomes = [failed()] * 1000
    with pytest.raises(StorageError, match="in the time that a signal leaves"):
        saves.save_last(TrainState(iteration=9), None)
    assert saves.clock.now <= module.HURRIED_SECONDS


def test_a_fault_of_the_program_is_not_tried_again(saves):
    saves.writer.outcomes = [("end", UserError("a tensor has no shape"))]
    saves.save(TrainState(), None)
    with pytest.raises(UserError, match="no shape"):
        saves.wait(TrainState())
    assert saves.clock.failures == []


def test_no_save_and_nothing_failed(saves):
    saves.check(TrainState())
    assert saves.wait(TrainState())
    assert not saves.is_retry_due()
