"""How a failed process ends: one clear line, an event, and at once, so that no thread that still waits for other ranks holds it back.

| status | what it means |
|---|---|
| 0 | done, or ended where it was told to |
| 1 | a fault of the program |
| 2 | a mistake in flags, files or data (UserError) |
| 75 | nothing is wrong with the run: a signal, a lost rank, a hang, a file system that failed for too long; started again it goes on |
"""

import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import StorageError
from megatron_llama3.training.events import EventLog
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.stop import RESTART_STATUS
from megatron_llama3.training.whereabouts import place_of_error

PATIENCE_SECONDS = 2.0

# What gloo, NCCL and the store say when a peer is gone; their complaints about wrong arguments are faults of the program.
_LOST_CONTACT = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout|failed to recv"
    r"|client socket has timed out|waiting for clients"  # rank 0, or the others, never came
    r"|ncclRemoteError|remote process|communicator was aborted|collective operation timeout",
    re.IGNORECASE,
)


def has_lost_contact(error: BaseException | None) -> bool:
    """Whether it comes from a collective or store that another rank left, on whatever way it came here."""
    while error is not None:
        if isinstance(error, RuntimeError) and _LOST_CONTACT.search(str(error)):
            return True
        error = error.__cause__
    return False


@contextmanager
def noted_failures(events: EventLog, state: TrainState, rank: int) -> Iterator[None]:
    """Keeps an event of what ends the block. That contact was lost, every rank sees: rank 0 alone notes it."""
    try:
        yield
    except Exception as error:
        lost = has_lost_contact(error)
        if rank == 0 or not lost:
            reason = "another rank was lost" if lost else _first_line(error)
            place = place_of_error(error)
            with suppress(UserError):  # a full disk has no room for this either
                events.add("failure", rank=rank, host=socket.gethostname(), iteration=state.iteration, phase=place.phase, reason=reason)
        raise


def run_and_exit(main: Callable[[], int | None]) -> None:
    """Runs a program's `main`, whose result is the exit status; never returns after a failure."""
    try:
        status = main()
    except UserError as error:
        if has_lost_contact(error):
            _lost_contact(error)
        if os.environ.get("RANK", "0") != "0":
            _let_others_speak_first()
        _exit(RESTART_STATUS if isinstance(error, StorageError) else 2, [f"error: {line}" for line in str(error).splitlines()])
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT, ["interrupted"] if os.environ.get("RANK", "0") == "0" else [])
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os._exit(1)
    except BaseException as error:  # some of torch's are no Exception
        if has_lost_contact(error):
            _lost_contact(error)
        _exit(1, traceback.format_exc().splitlines())
    raise SystemExit(status or 0)


def _let_others_speak_first() -> None:
    """What several ranks find wrong, the lowest says: a launcher ends the others when the first one ends. Later ranks wait longer."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE_SECONDS + 0.5 * (int(os.environ.get("RANK", "0")) % 8))


def _lost_contact(error: BaseException) -> None:
    _let_others_speak_first()
    rank, host = os.environ.get("RANK", "0"), socket.gethostname()
    reason = re.sub(r"^\[\S+\] ", "", _first_line(error)).partition(". ")[0]  # without gloo's source line and its advice
    line = f"rank {rank} on {host} lost contact with another rank in {place_of_error(error)}: {reason}"
    _exit(RESTART_STATUS, [f"error: {line}; start the run again to go on from its last checkpoint"])


def _exit(status: int, lines: list[str]) -> None:
    with suppress(OSError):  # where output goes may be what is full or gone
        sys.stdout.flush()
    with suppress(OSError):
        print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr, flush=True)
    os._exit(status)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
