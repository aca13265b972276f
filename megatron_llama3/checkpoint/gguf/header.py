"""What a GGUF file's header claims, held to the file before the `gguf` package makes an object of each entry."""

import mmap
import struct
from pathlib import Path

from megatron_llama3.checkpoint.lazy_tensor import map_file
from megatron_llama3.config.errors import UserError

MAX_ENTRIES = 1 << 21  # keys, tensors and elements of arrays; Llama 3's vocabulary with its types and merges has 0.54 million
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # a value's type -> its size
_STRING, _ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Raises UserError for a file that is no little-endian GGUF, and for counts and lengths that leave it or are beyond all measure."""
    try:
        _Header(map_file(path)).walk()
    except (struct.error, ValueError) as error:
        raise UserError(f"{path}: truncated, or not a GGUF file ({error})") from None


class _Header:
    """A walk over the header that reads no values. Raises ValueError (struct.error beyond the file's end)."""

    def __init__(self, data: mmap.mmap):
        self._data, self._position, self._entries = data, 0, 0

    def walk(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._position = 4
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise ValueError("its numbers are big-endian; gguf-convert-endian of the gguf package turns them")
        tensors, keys = self._number("<Q"), self._number("<Q")
        self._count(tensors + keys)
        for _ in range(keys):
            self._skip(self._number("<Q"))
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._skip(self._number("<Q"))
            self._skip(8 * self._number("<I") + 12)  # dimensions, type, offset

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY:
            kind, length = self._number("<I"), self._number("<Q")
            self._count(length)
            if kind in _VALUE_BYTES:
                self._skip(length * _VALUE_BYTES[kind])
            elif kind == _STRING:
                for _ in range(length):
                    self._value(kind)
            else:
                raise ValueError(f"an array of type {kind}")
        elif kind in _VALUE_BYTES:
            self._skip(_VALUE_BYTES[kind])
        else:
            raise ValueError(f"a value of type {kind}")

    def _number(self, code: str) -> int:
        (number,) = struct.unpack_from(code, self._data, self._position)
        self._skip(struct.calcsize(code))
        return number

    def _skip(self, size: int) -> None:
        self._position += size
        if self._position > len(self._data):
            raise ValueError(f"its header claims {self._position:,} bytes, the file has {len(self._data):,}")

    def _count(self, entries: int) -> None:
        self._entries += entries
        if self._entries > MAX_ENTRIES:
            raise ValueError(f"its header claims {self._entries:,} entries, more than {MAX_ENTRIES:,}")
