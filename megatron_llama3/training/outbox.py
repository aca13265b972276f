"""What a run writes about itself (metrics, events) and must not stop for: items that cannot be written now are kept and written later."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import FIRST_WAIT, LONGEST_WAIT, await_storage, is_passing, waits, words

MOST_KEPT = 100_000
LAST_MINUTES = 1.0


class Outbox:
    """Hands items to `write`, each once and in order. Those that it refuses wait in memory, the newest MOST_KEPT of them; `write` is tried
    again after a while. Said once for each time that it fails, and once when it works again.

    Raises UserError where the very first item fails for a reason that does not pass, such as a folder that may not be written.
    """

    def __init__(self, name: str, write: Callable[[Any], None], errors: tuple[type[Exception], ...] = (OSError,)):
        self.name, self.write, self.errors = name, write, errors
        self.kept: deque = deque(maxlen=MOST_KEPT)
        self.has_written, self.is_failing = False, False
        self.next_try, self.wait = 0.0, FIRST_WAIT

    def add(self, item: Any) -> None:
        self.kept.append(item)
        if time.monotonic() >= self.next_try:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept, as far as it goes."""
        started, late = time.monotonic(), len(self.kept)
        try:
            while self.kept:
                self.write(self.kept[0])
                self.kept.popleft()
                self.has_written = True
        except self.errors as error:
            self._failed(error, time.monotonic() - started)
            return
        if self.is_failing:
            _say(f"{self.name}: can be written again; {late} entries came late")
        self.is_failing, self.next_try, self.wait = False, 0.0, FIRST_WAIT

    def close(self) -> None:
        """A last attempt, for a minute at most."""
        for wait in [*waits(LAST_MINUTES), 0.0]:
            self.flush()
            if not self.kept:
                return
            await_storage(wait)
        _say(f"{self.name}: {len(self.kept)} entries are lost")

    def _failed(self, error: Exception, seconds: float) -> None:
        if not self.has_written and not is_passing(error):
            raise UserError(f"{self.name}: could not be written: {words(error)}") from error
        if not self.is_failing:
            _say(f"{self.name}: could not be written: {words(error)}; its entries are kept in memory until it can be")
        # A failing call may block for a minute; training has the longer part of the time.
        self.is_failing, self.next_try = True, time.monotonic() + max(self.wait, 10 * seconds)
        self.wait = min(2 * self.wait, LONGEST_WAIT)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
