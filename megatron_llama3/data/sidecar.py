"""PREFIX.json and PREFIX.sources.npy: what Megatron's format has no room for, kept beside it where Megatron does not look.

PREFIX.json
    {"format": "megatron_llama3 sidecar", "version": 1,
     "dtype": "uint16", "sequences": 3, "documents": 3, "tokens": 42, "largest_id": 511,
     "files": {"bin": {"bytes": 84, "crc32": [one for every 64 MiB]}, "idx": {...}, "sources.npy": {...}},
     "sources": [{"path": "corpus/a.jsonl.gz", "unit": "bytes"}, ...],
     "metadata": {anything the writing tool wants to keep: its flags, the tokenizer's hash}}
PREFIX.sources.npy
    int64 [documents, 3]: index into "sources", first and one past the last unit of the document in that file; -1, 0, 0 where unknown.
    The unit is "bytes" (of the uncompressed text, for .gz and .zst) or "rows" (Parquet).
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from zlib_ng.zlib_ng import crc32  # ten times as fast as zlib's

from megatron_llama3.config.errors import UserError

CHECKSUM_BLOCK_BYTES = 64 << 20
UNKNOWN_ORIGIN = (-1, 0, 0)
_FORMAT = "megatron_llama3 sidecar"


class BlockChecksums:
    """CRC-32 of every 64 MiB of a stream of bytes, so that a check can say where the damage is."""

    def __init__(self) -> None:
        self.bytes = 0
        self._finished: list[int] = []
        self._crc = 0

    def update(self, buffer: Any) -> None:
        """Takes the next bytes of the stream, any contiguous buffer."""
        view = memoryview(buffer).cast("B")
        while len(view):
            piece = view[: CHECKSUM_BLOCK_BYTES - self.bytes % CHECKSUM_BLOCK_BYTES]
            self._crc = crc32(piece, self._crc)
            self.bytes += len(piece)
            if self.bytes % CHECKSUM_BLOCK_BYTES == 0:
                self._finished.append(self._crc)
                self._crc = 0
            view = view[len(piece) :]

    def as_dict(self) -> dict[str, Any]:
        """{"bytes": n, "crc32": [one for every block, the last one perhaps short]}."""
        last = [self._crc] if self.bytes % CHECKSUM_BLOCK_BYTES else []
        return {"bytes": self.bytes, "crc32": self._finished + last}


def checksum_file(path: str | Path, chunk_bytes: int = 4 << 20) -> dict[str, Any]:
    """Reads a whole file; the dict that `BlockChecksums.as_dict` gives."""
    checksums = BlockChecksums()
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            checksums.update(chunk)
    return checksums.as_dict()


def describe_damage(path: str | Path, expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """One line that says how a file differs from its checksums, or None if it does not."""
    if found["bytes"] != expected["bytes"]:
        return f"{path}: {found['bytes']} bytes where its sidecar says {expected['bytes']}"
    bad = [i for i, (a, b) in enumerate(zip(expected["crc32"], found["crc32"])) if a != b]
    if not bad:
        return None
    start = bad[0] * CHECKSUM_BLOCK_BYTES
    stop = min(start + CHECKSUM_BLOCK_BYTES, expected["bytes"])
    return f"{path}: {len(bad)} of {len(expected['crc32'])} checksums differ, first in bytes {start} to {stop}"


def describe_damaged_block(path: str | Path, expected: dict[str, Any], block: int) -> str | None:
    """One line if the file's size, or one of its 64 MiB blocks, is not what its checksums say, or None."""
    size = os.path.getsize(path)
    if size != expected["bytes"]:
        return describe_damage(path, expected, {"bytes": size})
    start = block * CHECKSUM_BLOCK_BYTES
    with open(path, "rb") as file:
        file.seek(start)
        crc = crc32(file.read(CHECKSUM_BLOCK_BYTES))
    return None if crc == expected["crc32"][block] else f"{path}: bytes {start} to {min(start + CHECKSUM_BLOCK_BYTES, size)} are damaged"


def read_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """PREFIX.json as a dict, or None where there is none (Megatron's own files). Raises UserError if it cannot be read."""
    path = Path(f"{prefix}.json")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        sidecar = json.loads(text)
        if sidecar["format"] != _FORMAT or sidecar["version"] != 1:
            raise ValueError
        for entry in sidecar["files"].values():
            if not (isinstance(entry["bytes"], int) and isinstance(entry["crc32"], list)):
                raise TypeError
        sidecar["files"]["bin"], sidecar["files"]["idx"], sidecar["sources"], sidecar["metadata"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no sidecar of an indexed dataset, or a damaged one; remove it to go without checksums") from None
    return sidecar


def sidecar_bytes(fields: dict[str, Any]) -> bytes:
    """The text of PREFIX.json."""
    return json.dumps({"format": _FORMAT, "version": 1, **fields}, indent=1).encode() + b"\n"


def read_origins(prefix: str | Path, num_documents: int) -> np.ndarray | None:
    """PREFIX.sources.npy, memory-mapped, or None where there is none. Raises UserError if it does not fit the dataset."""
    path = f"{prefix}.sources.npy"
    if not os.path.exists(path):
        return None
    try:
        origins = np.load(path, mmap_mode="r" if num_documents else None)
    except (ValueError, OSError, EOFError):
        raise UserError(f"{path}: truncated or damaged; restore it, or remove it to go without provenance") from None
    if origins.shape != (num_documents, 3) or origins.dtype != np.int64:
        needed = (num_documents, 3)
        raise UserError(f"{path}: holds {origins.dtype} {origins.shape}, the dataset needs int64 {needed}; it belongs to another")
    return origins


def write_origins_header(file: BinaryIO, num_documents: int) -> None:
    """The .npy header; of the same length for every count, so that it can be written first as a placeholder and again at the end."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (num_documents, 3)})
