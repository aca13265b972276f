"""What happened to a run, over all its starts: `events.jsonl` beside `metrics.jsonl`, one JSON object a line.

    launch    since (when the process began); a launch without a start ended before it could train
    start     iteration, loaded, world_size, since (when the process began)     save       iteration, stall_seconds
    skip      iteration, reason, loss, gradient_norm, data                      evaluate   iteration, seconds
    rollback  iteration, to, lost_updates                                       straggler  iteration, rank, host, factor
    hang      rank, host, iteration, phase, call                                failure    rank, host, iteration, reason
    stop      iteration, reason, is_finished                                save_failed  iteration, reason, attempt

Every event has `event`, `time` (seconds since 1970) and, from training, `useful_seconds` (see TrainState). tools/report_run.py reads them.
A killed process may leave half a line: whoever appends next ends it, and readers pass over it.
"""

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.training.outbox import Outbox

EVENTS_FILE, METRICS_FILE = "events.jsonl", "metrics.jsonl"


class EventLog:
    """Any rank may append: a line is one write. Without --log-dir and --save nothing is kept. A file system that fails for a while stops
    nobody (training/outbox.py)."""

    def __init__(self, config: RunConfig):
        self.folder = log_folder(config)
        self.lines = line_file(self.folder / EVENTS_FILE) if self.folder is not None else None

    def add(self, event: str, **fields: Any) -> None:
        if self.lines is not None:
            self.lines.add({"event": event, "time": time.time()} | fields)

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()


def line_file(path: Path) -> Outbox:
    """Takes records (dict), each a line of the file at `path`."""
    return Outbox(str(path), lambda record: _append(path, record))


def log_folder(config: RunConfig) -> Path | None:
    folder = config.logging.log_dir or config.checkpoint.save
    return None if folder is None else Path(folder)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one line in one write, after ending one that a killed process left unfinished. Numbers that JSON lacks become text.

    Raises UserError where it cannot, such as on a full disk."""
    try:
        _append(path, record)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}") from error


def _append(path: Path, record: dict[str, Any]) -> None:
    line = json.dumps({key: _jsonable(value) for key, value in record.items()}).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        is_torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        line = b"\n" * is_torn + line
        if file.write(line) < len(line):  # a disk that fills up takes a part without an error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; none where there is no file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line, left by a killed process
        if isinstance(record, dict):
            records.append(record)
    return records


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold: what a start did again from its checkpoint on takes the place of what a crashed one wrote."""
    kept: dict[tuple, dict[str, Any]] = {}
    last = 0
    for record in read_lines(path):
        iteration = record.get("iteration", 0)
        kind = next((key for key in ("validation_loss", "save_stall_seconds", "lr") if key in record), "layers")
        if iteration < last:
            kept = {at: earlier for at, earlier in kept.items() if at[0] <= iteration}
        kept[iteration, kind], last = record, iteration
    return list(kept.values())


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
