"""Reads Megatron's indexed format without importing megatron-core: PREFIX.bin holds token ids, PREFIX.idx where they begin and end.

PREFIX.idx, little-endian: magic "MMIDIDX\\0\\0", version u64 = 1, dtype code u8, number of sequences S u64, number of document
borders D u64, sequence lengths i32 [S], sequence pointers in bytes i64 [S], document borders as sequence numbers i64 [D].
A document is one or more sequences; `tools/preprocess_data.py` makes one of each. Opening checks the index against itself, against
the size of PREFIX.bin, and against the checksum in PREFIX.json where there is one.
"""

import hashlib
import mmap
import os
import struct
from functools import cached_property
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import is_there
from megatron_llama3.data.dataset_writer import DTYPE_CODES, HEADER_BYTES, MAGIC, IndexedDatasetWriter, dtype_for_vocab_size
from megatron_llama3.data.sidecar import checksum_file, describe_damage, read_origins, read_sidecar

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "dtype_for_vocab_size"]

_CHUNK = 1 << 20  # entries of the index looked at together, so that checking 10^8 documents needs little memory


class IndexedDataset:
    """A dataset on disk, memory-mapped.

    Attributes: prefix; dtype; num_sequences, num_documents, num_tokens; sequence_lengths int32 [S]; document_borders int64 [D+1], in
    sequences; document_lengths [D], in tokens; sidecar, the dict of PREFIX.json or None.

    Raises UserError where a file is missing, truncated or damaged, or where the two files do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = f"{prefix}.idx", f"{prefix}.bin"
        self.sidecar = read_sidecar(prefix)
        bin_bytes = self._open_index()
        self._check_index(bin_bytes)
        self.num_tokens = bin_bytes // self.dtype.itemsize
        self._tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r") if bin_bytes else np.empty(0, self.dtype)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.idx_path}: {what}; the dataset is damaged or incomplete: make it again")

    def _open_index(self) -> int:
        """Maps the arrays of the index; returns the size of PREFIX.bin."""
        for path in (self.idx_path, self.bin_path):
            if not is_there(path):
                raise UserError(f"{path}: no such file; a dataset is named by its prefix, the path without .bin and .idx")
        size, bin_bytes = os.path.getsize(self.idx_path), os.path.getsize(self.bin_path)
        if size < HEADER_BYTES:
            raise self._damaged(f"{size} bytes, shorter than a header")
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        magic, version, code, sequences, borders = struct.unpack("<9sQBQQ", index[:HEADER_BYTES].tobytes())
        if magic != MAGIC or version != 1:
            raise UserError(f"{self.idx_path}: not an index of Megatron's format, version 1 (starts with {magic!r}, version {version})")
        if code not in DTYPE_CODES or DTYPE_CODES[code].kind not in "iu":
            raise self._damaged(f"dtype code {code} is no integer type")
        expected = HEADER_BYTES + 12 * sequences + 8 * borders
        if size != expected:
            raise self._damaged(f"{size} bytes where its header ({sequences} sequences, {borders} document borders) needs {expected}")
        self.dtype, self.num_sequences, self.num_documents = DTYPE_CODES[code], sequences, borders - 1
        self.sequence_lengths = np.ndarray(sequences, "<i4", buffer=index, offset=HEADER_BYTES)
        self._pointers = np.ndarray(sequences, "<i8", buffer=index, offset=HEADER_BYTES + 4 * sequences)
        self.document_borders = np.ndarray(borders, "<i8", buffer=index, offset=HEADER_BYTES + 12 * sequences)
        return bin_bytes

    def _check_index(self, bin_bytes: int) -> None:
        total, itemsize = 0, self.dtype.itemsize
        for start in range(0, self.num_sequences, _CHUNK):
            lengths = self.sequence_lengths[start : start + _CHUNK].astype(np.int64)
            pointers = total + np.cumsum(lengths) * itemsize
            if lengths.min() < 0 or self._pointers[start] != total or (self._pointers[start + 1 : start + _CHUNK] != pointers[:-1]).any():
                raise self._damaged(f"lengths and pointers disagree within sequences {start} to {start + len(lengths)}")
            total = int(pointers[-1])
        if total != bin_bytes:
            raise self._damaged(f"its sequences take {total} bytes, but {self.bin_path} has {bin_bytes}")
        borders = self.document_borders
        if not len(borders) or borders[0] != 0 or borders[-1] != self.num_sequences:
            raise self._damaged(f"document borders do not run from 0 to {self.num_sequences} sequences")
        self._one_sequence_each = self.num_documents == self.num_sequences
        for start in range(0, len(borders), _CHUNK):
            chunk = borders[start : start + _CHUNK + 1]
            if (chunk[1:] < chunk[:-1]).any():  # compared, since a difference of damaged borders may overflow
                raise self._damaged(f"document borders decrease within documents {start} to {start + len(chunk) - 1}")
            self._one_sequence_each &= bool((np.diff(chunk) == 1).all())
        if self.sidecar is None:
            return
        if damage := describe_damage(self.idx_path, self.sidecar["files"]["idx"], checksum_file(self.idx_path)):
            raise UserError(f"{damage}; it is damaged, or another tool wrote it: make the dataset again, or remove {self.prefix}.json")

    @cached_property
    def _sequence_starts(self) -> np.ndarray:
        """Token offset of every sequence, and one past the last, int64 [S + 1]."""
        return np.append(self._pointers // self.dtype.itemsize, self.num_tokens)

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """Tokens in every document, int32 or int64 [D]."""
        return self.sequence_lengths if self._one_sequence_each else np.diff(self._sequence_starts[self.document_borders])

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """Offset of each document's first token in the flat token stream, int64 of the shape of `documents`."""
        if self._one_sequence_each:
            return self._pointers[documents] // self.dtype.itemsize
        return self._sequence_starts[self.document_borders[documents]]

    def document(self, i: int) -> np.ndarray:
        """Token ids of document i, a read-only view of the file."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        return self.tokens(int(self.document_starts(np.int64(i))), int(self.document_lengths[i]))

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Token ids start to start + length of the flat stream, a read-only view of the file."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.num_tokens}")
        return self._tokens[start : start + length]

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """Token ids at any positions of the flat stream, a copy in the dataset's dtype."""
        return self._tokens[positions]

    def read_ahead(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Has the system begin to read stretches of the flat stream; does not wait for it. Both int64 [n], in tokens."""
        for start, length in zip(starts.tolist(), lengths.tolist()):
            begin, end = start * self.dtype.itemsize, (start + length) * self.dtype.itemsize
            begin -= begin % mmap.PAGESIZE
            self._tokens.base.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    @cached_property
    def origins(self) -> np.ndarray | None:
        """Where each document came from, int64 [D, 3] as `sidecar.py` describes, or None where that was not recorded."""
        return read_origins(self.prefix, self.num_documents)

    @property
    def largest_id(self) -> int | None:
        """The largest token id, -1 without tokens, or None where the sidecar does not say."""
        return (self.sidecar or {}).get("largest_id")

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that name the content wherever the files lie: the whole index and 16 samples of the tokens."""
        digest = hashlib.sha256()
        crc = 0
        with open(self.idx_path, "rb") as file:
            while chunk := file.read(4 << 20):
                crc = crc32(chunk, crc)
        digest.update(struct.pack("<QQQI", self.num_sequences, self.num_documents, self.num_tokens, crc))
        for sample in range(16):
            start = (self.num_tokens - 1024) * sample // 15 if self.num_tokens > 1024 else 0
            digest.update(self._tokens[start : start + 1024].astype("<i8").tobytes())
        return digest.hexdigest()[:32]
