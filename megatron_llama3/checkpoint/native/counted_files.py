"""torch.distributed.checkpoint's files, with what is read and written counted as progress."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_llama3.training.progress import moved

SYNC_BYTES = 256 << 20
"""Written to disk at least so often: otherwise a slow disk shows no progress for as long as it takes for the whole file."""


class CountedFiles(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.BufferedIOBase]:
        raw = _CountedFile(path, mode)
        with (io.BufferedWriter if "w" in mode else io.BufferedReader)(raw) as stream:
            yield stream


class _CountedFile(io.FileIO):
    unsynced = 0

    def write(self, data: memoryview) -> int:
        count = super().write(data)
        moved(count)
        self.unsynced += count
        if self.unsynced >= SYNC_BYTES:
            os.fsync(self.fileno())
            self.unsynced = 0
        return count

    def readinto(self, buffer: memoryview) -> int:
        count = super().readinto(buffer)
        moved(count)
        return count
