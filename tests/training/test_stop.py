"""Why a run ends between two steps, and with which status."""

import os
import signal

import pytest
import torch.distributed as dist

from megatron_llama3.config.run import RunConfig
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.training import stop
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.stop import RESTART_STATUS, StopReasons


@pytest.fixture
def reasons(monkeypatch):
    """reasons(**training flags) of a job of one rank whose clock stands at 1,000 s; handlers of signals are put back."""
    handlers = {number: signal.getsignal(number) for number in (*stop.SIGNALS, signal.SIGINT)}
    monkeypatch.setattr(stop, "_largest", lambda here, control: int(here))
    monkeypatch.setattr(stop.time, "monotonic", lambda: 1000.0)

    def make(**flags) -> StopReasons:
        config = RunConfig()
        config.training.train_iters = 100
        for name, value in flags.items():
            setattr(config.training, name, value)
        return StopReasons(config)

    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_last_step_ends_the_run(reasons):
    found = reasons(exit_interval=50)
    assert [found.after(TrainState(iteration), None) for iteration in (1, 49, 51, 99)] == [None] * 4
    assert [found.after(TrainState(iteration), None) for iteration in (100, 101)] == ["--train-iters is reached"] * 2
    assert found.exit_status(TrainState(100)) == 0


def test_an_interval_ends_it_at_its_multiples(reasons):
    found = reasons(exit_interval=7)
    ends = [iteration for iteration in range(1, 30) if found.after(TrainState(iteration), None) == "--exit-interval is reached"]
    assert ends == [7, 14, 21, 28]
    assert found.exit_status(TrainState(7)) == 0, "it was told to end here"


def test_the_duration_is_in_minutes_since_the_start(reasons, monkeypatch):
    found = reasons(exit_duration_in_mins=2)
    for seconds, reason in ((0, None), (119, None), (120, None), (121, "--exit-duration-in-mins is over")):
        monkeypatch.setattr(stop.time, "monotonic", lambda seconds=seconds: 1000.0 + seconds)
        assert found.after(TrainState(5), None) == reason
    assert found.exit_status(TrainState(5)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_kept_until_the_step_is_done(reasons, number):
    found = reasons(exit_signal_handler=True)
    assert found.after(TrainState(5), None) is None
    assert found.exit_status(TrainState(5)) == 0
    os.kill(os.getpid(), number)
    assert found.after(TrainState(6), None) == f"{number.name} was received"
    assert (found.exit_status(TrainState(6)), found.exit_status(TrainState(99))) == (RESTART_STATUS, 75)
    assert found.exit_status(TrainState(100)) == 0, "nothing is left to do"


def test_without_the_flag_signals_are_left_alone(reasons):
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    assert reasons().after(TrainState(5), None) is None
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before


def test_an_interrupt_ends_it_after_the_step_without_any_flag(reasons, monkeypatch, capsys):
    """torchrun passes on what the terminal sent already; only one that comes later is a second one."""
    monkeypatch.setenv("RANK", "0")
    found = reasons()
    os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(stop.time, "monotonic", lambda: 1002.9)
    os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().err == "\ninterrupted: the run saves and ends after this step (again: at once, without saving)\n"
    assert found.after(TrainState(6), None) == "SIGINT was received"
    assert (found.exit_status(TrainState(6)), found.exit_status(TrainState(100))) == (75, 0)
    monkeypatch.setattr(stop.time, "monotonic", lambda: 1006.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_all_ranks_are_asked_for_signals_and_for_a_duration_where_there_is_one(reasons, monkeypatch):
    asked = []
    monkeypatch.setattr(stop, "_largest", lambda here, control: asked.append((int(here), control)) or 0)
    reasons().after(TrainState(5), "control")
    assert asked == [(0, "control")]
    reasons(exit_duration_in_mins=1, exit_signal_handler=True).after(TrainState(5), "control")
    assert asked == [(0, "control")] * 3


@pytest.mark.parametrize("signalled", [0, signal.SIGUSR1])
def test_a_signal_hurries_the_last_save(reasons, signalled):
    found = reasons()
    found.signalled = signalled
    assert found.is_hurried("control") == bool(signalled)


def _agreed() -> tuple[int, str | None]:
    """The last rank alone got the signal."""
    config = RunConfig()
    config.training.train_iters, config.training.exit_signal_handler = 100, True
    found = StopReasons(config)
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    reason = found.after(TrainState(3), dist.group.WORLD)
    return found.exit_status(TrainState(3)), reason


def test_all_ranks_stop_for_a_signal_that_one_of_them_got():
    assert run_ranks(3, _agreed) == [(75, "SIGUSR1 was received")] * 3
