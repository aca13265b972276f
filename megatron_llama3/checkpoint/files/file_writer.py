"""A file written front to back in blocks, on its way to disk while the next block is made, with the CRC-32 of all of it."""

import contextlib
import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from zlib_ng.zlib_ng import crc32, crc32_combine  # ten times as fast as zlib's

# Larger writes make the kernel cache the file in 2 MiB pages: free memory of that size is what a virtual machine has given back to its
# host, and getting it again takes several times as long as the copy. Checksum and copy also share the processor's cache at this size.
_WRITE_BYTES = 256 << 10
_WRITE_OUT_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)


class FileWriter:
    """`position` is where the next byte goes, `crc` the CRC-32 of all that was written. A block that ends well leaves it on disk.

    With `start` it writes into a file that is there, from that byte on.
    """

    def __init__(self, path: Path, start: int | None = None):
        self._file = open(path, "wb" if start is None else "r+b", buffering=0)  # noqa: SIM115  closed by __exit__
        self.position = self._written_out = self._file.seek(start or 0)
        self.crc = 0

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())

    def write(self, pieces: Iterable[bytes | memoryview]) -> tuple[int, int]:
        """Appends the pieces. Returns (their bytes, their CRC-32)."""
        size, crc = 0, 0
        for piece in pieces:
            view = memoryview(piece)
            size += len(view)
            for start in range(0, len(view), _WRITE_BYTES):
                part = view[start : start + _WRITE_BYTES]
                crc = crc32(part, crc)
                self._append(part)
        self.crc = crc32_combine(self.crc, crc, size)
        return size, crc

    def _append(self, rest: memoryview) -> None:
        while len(rest):  # a full disk gives a short write first, then the error
            written = self._file.write(rest)
            rest = rest[written:]
            self.position += written
        if self.position - self._written_out >= _WRITE_OUT_BYTES:
            self._start_write_out()

    def _start_write_out(self) -> None:
        """Has the kernel begin to write what it would keep until the sync at the end; without the call (no Linux) nothing is lost."""
        start, self._written_out = self._written_out, self.position
        with contextlib.suppress(AttributeError):
            length = self._written_out - start
            _libc.sync_file_range(self._file.fileno(), ctypes.c_int64(start), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)
