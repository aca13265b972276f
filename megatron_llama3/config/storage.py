"""A file system that fails for a while: which errors pass by themselves, and how long a run tries again before it ends with status 75."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from megatron_llama3.config.errors import UserError

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EROFS", "ENOSPC", "EDQUOT", "ESTALE", "EIO", "EREMOTEIO", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "ENOLCK", "ENOTCONN"),
        *("ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ENXIO"),
    )
)
"""Read-only, full, stale, or its server does not answer: what an administrator or the other machine mends, not another command line."""

Result = TypeVar("Result")


class StorageError(UserError):
    """A file system failed, in a way that another attempt may not meet: the run ends with status 75 instead of 2."""


def is_passing(error: BaseException | None) -> bool:
    """Whether it is a failure of a file system that may pass, or was raised because of one."""
    while error is not None:
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in PASSING):
            return True
        error = error.__cause__ or error.__context__
    return False


def words(error: BaseException) -> str:
    """One line for it: the file and the system's reason, or what it says itself."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def user_error(error: Exception, about: str = "") -> UserError:
    """`about` and the error's words, as what ends a run: a StorageError where it may pass, else a UserError. An error that is that already
    is returned."""
    if isinstance(error, StorageError if is_passing(error) else UserError) and not about:
        return error
    return (StorageError if is_passing(error) else UserError)(f"{about}{words(error)}")


def waits(minutes: float) -> Iterator[float]:
    """Seconds before each further attempt: 1, 2, 4 and so on, 30 at most, `minutes` in all."""
    left, wait = 60 * minutes, FIRST_WAIT
    while left > 0:
        yield min(wait, left)
        left -= wait
        wait = min(2 * wait, LONGEST_WAIT)


def patiently(attempt: Callable[[], Result], minutes: float, speaks: bool = True) -> Result:
    """What `attempt` gives, which is called again after failures that may pass. Says so once, and when it goes on, where it `speaks`.

    Ranks whose attempts fail together try equally often. Raises StorageError when all attempts failed, and at once UserError for what
    another attempt cannot mend.
    """
    failures = 0
    for wait in [*waits(minutes), None]:
        try:
            result = attempt()
            break
        except (OSError, UserError) as error:
            failure = user_error(error)
            if wait is None or not isinstance(failure, StorageError):
                raise failure  # noqa: B904 - it may be the same one
            if speaks and not failures:
                print(f"storage fails: {failure}; tried again for up to {minutes:g} minutes", flush=True)
        failures += 1
        await_storage(wait)
    if speaks and failures:
        print("storage answers again", flush=True)
    return result


def await_storage(seconds: float) -> None:
    """Sleeps between two attempts; training/whereabouts.py knows a rank that waits here by this name."""
    time.sleep(seconds)


def is_there(path: Path | str) -> bool:
    """Whether the file or folder exists. Unlike `Path.exists` and its like raises OSError where the file system does not say."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
