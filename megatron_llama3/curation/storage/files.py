"""Files that are whole or absent, and where a task's files lie."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A new file under another name, synced and renamed to `path` when the block ends without an exception, else removed.

    Each writer's aside name is its own: a task that outlives a killed run cannot spoil the file of the task that replaces it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_array(path: str | Path, array: np.ndarray) -> None:
    with whole_file(path) as file:
        np.save(file, array)


def task_file(folder: str, rank: int, suffix: str) -> str:
    """`FOLDER/00003.SUFFIX`."""
    return os.path.join(folder, f"{rank:05d}.{suffix}")
