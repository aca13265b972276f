"""Progress of a preprocessing job: a tqdm bar on a terminal, plain lines in a log."""

import sys
import time

from megatron_llama3.data.preprocess_inputs import Unit


class Progress:
    """Counts what workers report. `total`: bytes of input, or None where unknown. `log_interval`: documents between lines in a log."""

    def __init__(self, total: int | None, log_interval: int):
        self._total, self._log_interval = total, log_interval
        self._started = self._printed_at = time.monotonic()
        self._documents = self._tokens = self._bytes = self._skipped = self._printed = 0
        self._of_unit: dict[int, int] = {}
        self._bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.2)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, number: int, unit: Unit, documents: int, tokens: int, input_bytes: int) -> None:
        """A worker has done a part of a unit. Compressed input yields more bytes than the unit stands for: those are left out."""
        self._documents += documents
        self._tokens += tokens
        before = self._of_unit.get(number, 0)
        self._of_unit[number] = min(before + input_bytes, unit.size)
        self._advance(self._of_unit[number] - before)

    def finish(self, number: int, unit: Unit) -> None:
        self._advance(unit.size - self._of_unit.pop(number, 0))

    def skip(self, unit: Unit) -> None:
        """A unit that an earlier run has done."""
        self._skipped += unit.size
        self._advance(unit.size)

    def _advance(self, input_bytes: int) -> None:
        self._bytes += input_bytes
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        speed = f"{self._documents / seconds:,.0f} documents/s, {self._tokens / seconds / 1e6:.2f} M tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(input_bytes)
        elif self._documents - self._printed >= self._log_interval and now - self._printed_at >= 1:
            self._printed, self._printed_at = self._documents, now
            print(f"{self._documents:,} documents, {self._tokens:,} tokens, {speed}{self._left(seconds)}", file=sys.stderr, flush=True)

    def _left(self, seconds: float) -> str:
        done = self._bytes - self._skipped
        if self._total is None or not done:
            return ""
        return f", {100 * self._bytes / self._total:.0f}% done, {seconds * (self._total - self._bytes) / done:.0f} s left"
