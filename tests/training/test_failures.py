"""How a failed process ends: the status and the line of each kind of failure, and who waits for whom."""

import signal
from types import SimpleNamespace

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import StorageError
from megatron_llama3.training import failures
from megatron_llama3.training.failures import has_lost_contact, run_and_exit

LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53386. This is typically a fault"


class Ended(BaseException):
    pass


@pytest.fixture
def end(monkeypatch, capsys):
    """end(what main raises or returns, rank) -> (exit status, lines on stderr, seconds slept before, handlers set before)."""

    def run(outcome, rank: int | None = 0) -> tuple[int, list[str], list[float], list]:
        slept, handlers = [], []

        def exit_now(status: int) -> None:
            raise Ended(status)

        environment = {} if rank is None else {"RANK": str(rank)}
        monkeypatch.setattr(failures, "os", SimpleNamespace(_exit=exit_now, environ=environment))
        monkeypatch.setattr(failures, "time", SimpleNamespace(sleep=slept.append))
        monkeypatch.setattr(failures, "socket", SimpleNamespace(gethostname=lambda: "node7"))
        own = SimpleNamespace(
            SIGTERM=signal.SIGTERM, SIGINT=signal.SIGINT, SIG_DFL=signal.SIG_DFL, signal=lambda *how: handlers.append(how)
        )
        monkeypatch.setattr(failures, "signal", own)

        def main():
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        with pytest.raises((Ended, SystemExit)) as caught:
            run_and_exit(main)
        status = caught.value.args[0] if caught.value.args else caught.value.code
        return status, capsys.readouterr().err.splitlines(), slept, handlers

    return run


def caused_by(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


def test_what_main_returns_is_the_status(end):
    assert end(None) == (0, [], [], [])
    assert end(75) == (75, [], [], [])


@pytest.mark.parametrize("rank", [None, 0])
def test_a_mistake_is_said_line_by_line_by_the_lowest_rank_at_once(end, rank):
    assert end(UserError("--save: no space left\n--load: no such folder"), rank) == (
        *(2, ["error: --save: no space left", "error: --load: no such folder"]), [], [],
    )  # fmt: skip


def test_other_ranks_give_it_time_and_can_be_ended_meanwhile(end):
    for rank, seconds in ((1, 2.5), (7, 5.5), (8, 2.0), (10, 3.0)):
        assert end(UserError("--save: no"), rank) == (2, ["error: --save: no"], [seconds], [(signal.SIGTERM, signal.SIG_DFL)])


@pytest.mark.parametrize("outer", [None, UserError("checkpoint could not be written"), ValueError("batch"), BaseException("not even this")])
@pytest.mark.parametrize("rank", [0, 3])
def test_lost_contact_restarts_the_run_however_it_came_here(end, outer, rank):
    error = RuntimeError(LOST) if outer is None else caused_by(outer, RuntimeError(LOST))
    status, (line,), slept, handlers = end(error, rank)
    assert (status, slept, handlers) == (75, [2.0 + 0.5 * rank], [(signal.SIGTERM, signal.SIG_DFL)])
    assert line.startswith(f"error: rank {rank} on node7 lost contact with another rank in ")
    said = "Connection closed by peer [127.0.0.1]:53386" if outer is None else str(outer)
    assert line.endswith(f": {said}; start the run again to go on from its last checkpoint")


def test_a_fault_of_the_program_shows_where_it_is(end):
    status, lines, slept, _ = end(KeyError("w1"), 3)
    assert (status, slept) == (1, [])
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "KeyError: 'w1'")


def test_a_reader_that_has_seen_enough_is_no_fault_to_tell_of(end):
    assert end(BrokenPipeError(), 0) == (1, [], [], [])


def test_who_ends_the_program_on_purpose_is_let_through():
    error = SystemExit(3)

    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_and_exit(main)
    assert caught.value is error


@pytest.mark.parametrize("rank, lines", [(None, ["interrupted"]), (0, ["interrupted"]), (2, [])])
def test_a_second_interrupt_is_one_line_of_the_first_rank(end, rank, lines):
    assert end(KeyboardInterrupt(), rank) == (130, lines, [], [])


@pytest.mark.parametrize("rank, seconds", [(0, []), (3, [3.5])])
def test_a_file_system_that_failed_for_too_long_restarts_the_run(end, rank, seconds):
    assert end(StorageError("--save: no space left"), rank)[:3] == (75, ["error: --save: no space left"], seconds)


@pytest.mark.parametrize(
    "said",
    [
        *("Connection closed by peer", "connection reset by peer", "Connection refused", "Broken pipe", "Timed out waiting 1800000ms"),
        *("Socket Timeout", "failed to recv, got 0 bytes", "ncclRemoteError: A call failed", "the remote process exited"),
        *("NCCL communicator was aborted on rank 1", "Watchdog caught collective operation timeout"),
    ],
)
def test_what_torch_says_of_a_lost_rank(said):
    assert has_lost_contact(RuntimeError(said))
    assert has_lost_contact(caused_by(ValueError("x"), caused_by(KeyError("y"), RuntimeError(said))))
    assert not has_lost_contact(ValueError(said))


def test_an_error_without_words_goes_by_its_type(end):
    assert failures._first_line(ValueError("  \n")) == "ValueError"
    assert failures._first_line(ValueError("\n one\ntwo")) == "one"
