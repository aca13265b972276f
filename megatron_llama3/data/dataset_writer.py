"""Writes Megatron's indexed format, in constant memory, so that no file under its final name is ever incomplete.

    with IndexedDatasetWriter("corpus_text_document", dtype_for_vocab_size(128256)) as writer:
        writer.add_documents(flat_ids, lengths)
        writer.finalize()

Everything goes to PREFIX.*.partial. `finalize` syncs these, removes an old PREFIX.idx, renames .bin and the sidecar, and .idx last: as a
dataset opens by its .idx, a crash leaves the old dataset, none, or the new one, and never the index of one with the tokens of another.
"""

import contextlib
import fcntl
import io
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.sidecar import UNKNOWN_ORIGIN, BlockChecksums, checksum_file, describe_damage, sidecar_bytes, write_origins_header

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPE_CODES = {
    code: np.dtype(name) for code, name in enumerate(["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"], start=1)
}
_CHUNK = 1 << 20
# Larger writes are cached in pages of 2 MiB, which a virtual machine has to fetch from its host: up to four times the time.
WRITE_BYTES = 64 << 10
_FINAL = ("bin", "sources.npy", "json", "idx")  # in the order of their renaming
_SCRATCH = ("lengths", "borders")


def dtype_for_vocab_size(vocab_size: int) -> np.dtype:
    """megatron-core's choice: uint16 below 65,500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDatasetWriter:
    """Writer of PREFIX.bin, PREFIX.idx and the sidecar of `sidecar.py`. A context manager: leaving it without `finalize` aborts.

    tokens_path: where the tokens grow, in place of PREFIX.bin.partial, on the same file system; what it holds can be taken up again by
    `add_written`, as leaving without `finalize` does not remove it.
    Raises UserError where another process writes to the same prefix, the disk is full, or an id does not fit the dtype.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type, tokens_path: str | Path | None = None) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        if self.dtype not in DTYPE_CODES.values() or self.dtype.kind not in "iu":
            raise UserError(f"{prefix}: dtype {self.dtype} is none of Megatron's integer types")
        self.num_sequences = self.num_documents = self.num_tokens = 0
        self._largest_id = -1
        self._open_length = 0  # tokens of the document that append_tokens has begun
        self._checksums = BlockChecksums()
        self._has_origins = self._named = False
        self._files = contextlib.ExitStack()
        with self._clear_errors():
            os.makedirs(os.path.dirname(self.prefix) or ".", exist_ok=True)
            # .idx is locked, because it is the last to be renamed: while it has its partial name, every partial file is this writer's.
            self._index = self._files.enter_context(_open_locked(self._partial("idx")))
            self._tokens_path = str(tokens_path or self._partial("bin"))
            self._tokens = self._open_tokens(keep=tokens_path is not None)
            self._lengths, self._borders, self._origins = map(self._create, (*_SCRATCH, "sources.npy"))
            self._borders.write(struct.pack("<q", 0))
            write_origins_header(self._origins, 0)

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

    def _partial(self, part: str) -> str:
        return f"{self.prefix}.{part}.partial"

    def _create(self, part: str) -> BinaryIO:
        return self._files.enter_context(open(self._partial(part), "w+b", buffering=WRITE_BYTES))

    def _open_tokens(self, keep: bool) -> BinaryIO:
        descriptor = os.open(self._tokens_path, os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC), 0o666)
        return self._files.enter_context(open(descriptor, "r+b", buffering=WRITE_BYTES))

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {error.filename or self.prefix}: {error.strerror}") from error

    def _write_tokens(self, ids: np.ndarray) -> int:
        ids = np.asarray(ids).reshape(-1)
        if ids.dtype != self.dtype and ids.size:
            limits = np.iinfo(self.dtype)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high > limits.max:
                bad = low if low < 0 else high
                raise UserError(f"{self.prefix}: token id {bad} does not fit {self.dtype}; was the vocabulary size given right?")
        data = np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")).view(np.uint8).data
        with self._clear_errors():
            for start in range(0, len(data), WRITE_BYTES):
                self._tokens.write(data[start : start + WRITE_BYTES])
        self._checksums.update(data)
        self._largest_id = max(self._largest_id, int(ids.max()) if ids.size else -1)
        self.num_tokens += ids.size
        return ids.size

    def _add_sequences(self, lengths: np.ndarray, borders: np.ndarray, origins: np.ndarray | None) -> None:
        """borders: ends of the new documents, counted in sequences from the first new one."""
        self._has_origins |= origins is not None
        if origins is None:
            origins = np.tile(np.array(UNKNOWN_ORIGIN), (len(borders), 1))
        origins = np.asarray(origins, dtype="<i8").reshape(-1, 3)
        if len(origins) != len(borders):
            raise ValueError(f"{len(origins)} origins for {len(borders)} documents")
        with self._clear_errors():
            self._lengths.write(np.ascontiguousarray(lengths, dtype="<i4").data)
            self._borders.write(np.ascontiguousarray(borders + self.num_sequences, dtype="<i8").data)
            self._origins.write(np.ascontiguousarray(origins).data)
        self.num_sequences += len(lengths)
        self.num_documents += len(borders)

    def add_document(self, ids: np.ndarray, origin: tuple[int, int, int] | None = None) -> None:
        """One document of one sequence. ids: any integer dtype [n]; origin: a row of PREFIX.sources.npy (see `sidecar.py`)."""
        self.append_tokens(ids)
        self.end_document(origin)

    def add_documents(self, flat_ids: np.ndarray, lengths: np.ndarray, origins: np.ndarray | None = None) -> None:
        """Many documents at once. flat_ids [sum(lengths)], lengths [n] in tokens, origins int64 [n, 3] or None."""
        lengths = np.asarray(lengths, dtype=np.int64).reshape(-1)
        if self._open_length or lengths.sum() != np.size(flat_ids) or (lengths.size and lengths.min() < 0):
            raise ValueError(f"lengths sum to {lengths.sum()}, ids are {np.size(flat_ids)}, an unended document has {self._open_length}")
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise _too_long(self.prefix, lengths.max())
        self._write_tokens(flat_ids)
        self._add_sequences(lengths, np.arange(1, len(lengths) + 1), origins)

    def add_file(self, path: str | Path, lengths: np.ndarray, origins: np.ndarray, largest_id: int) -> None:
        """Documents whose ids, end to end in this writer's dtype, are the bytes of a file. lengths [n] in tokens, origins int64 [n, 3];
        largest_id: the largest of the ids, -1 where there are none. On return the file is no longer needed.
        """
        with self._clear_errors(), open(path, "rb", buffering=0) as file:
            self._add_stream(file, os.fstat(file.fileno()).st_size, lengths, origins, largest_id, self._tokens.write)
            self._tokens.flush()

    def add_written(self, lengths: np.ndarray, origins: np.ndarray, largest_id: int) -> None:
        """Documents whose ids are the next bytes of `tokens_path` already, as an earlier writer's `add_file` left them there."""
        begin, size = self._checksums.bytes, int(lengths.sum()) * self.dtype.itemsize
        with self._clear_errors(), open(self._tokens_path, "rb", buffering=0) as file:
            file.seek(begin)
            self._add_stream(file, size, lengths, origins, largest_id, lambda _: None)
            self._tokens.seek(begin + size)

    def _add_stream(
        self, file: io.FileIO, size: int, lengths: np.ndarray, origins: np.ndarray, largest_id: int, write: Callable[[memoryview], object]
    ) -> None:
        """The next `size` bytes of a file, given to `write`."""
        expected = int(lengths.sum())
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise _too_long(self.prefix, lengths.max())
        if size != expected * self.dtype.itemsize:
            raise ValueError(f"{file.name} holds {size} bytes, its documents {expected} tokens")
        buffer = memoryview(bytearray(WRITE_BYTES))  # stays in the processor's cache between reading, summing and writing
        while size:
            read = file.readinto(buffer[:size])
            if not read:
                raise ValueError(f"{file.name} ends {size} bytes early")
            write(buffer[:read])
            self._checksums.update(buffer[:read])
            size -= read
        self._largest_id = max(self._largest_id, largest_id)
        self.num_tokens += expected
        self._add_sequences(lengths, np.arange(1, len(lengths) + 1), origins)

    def append_tokens(self, ids: np.ndarray) -> None:
        """A part of a document that is too long to hold at once; `end_document` ends it."""
        self._open_length += self._write_tokens(ids)
        if self._open_length > np.iinfo(np.int32).max:
            raise _too_long(self.prefix, self._open_length)

    def end_document(self, origin: tuple[int, int, int] | None = None) -> None:
        """Ends the document that `append_tokens` has begun."""
        self._add_sequences(np.array([self._open_length]), np.array([1]), None if origin is None else np.array([origin]))
        self._open_length = 0

    def add_dataset(self, dataset: Any, first_source: int = 0) -> None:
        """Appends a whole `IndexedDataset`, sequence borders kept; `first_source` is added to the source numbers of its origins.

        Raises UserError for another dtype, and where the tokens read differ from the dataset's checksums.
        """
        if dataset.dtype != self.dtype:
            raise UserError(f"{dataset.prefix}.bin holds {dataset.dtype}, {self.prefix}.bin {self.dtype}: made with other vocabularies?")
        read = BlockChecksums()
        for start in range(0, dataset.num_tokens, 4 * _CHUNK):
            tokens = dataset.tokens(start, min(4 * _CHUNK, dataset.num_tokens - start))
            read.update(tokens.view(np.uint8))
            self._write_tokens(tokens)
        if dataset.sidecar and (damage := describe_damage(dataset.bin_path, dataset.sidecar["files"]["bin"], read.as_dict())):
            raise UserError(f"{damage}; make that dataset again")
        no_border, first_sequence = np.empty(0, np.int64), self.num_sequences
        for start in range(0, dataset.num_sequences, _CHUNK):
            self._add_sequences(dataset.sequence_lengths[start : start + _CHUNK], no_border, None)
        for start in range(0, dataset.num_documents, _CHUNK):
            borders = dataset.document_borders[start + 1 : start + 1 + _CHUNK] + first_sequence - self.num_sequences
            origins = None if dataset.origins is None else np.array(dataset.origins[start : start + _CHUNK])
            if origins is not None:
                origins[origins[:, 0] >= 0, 0] += first_source
            self._add_sequences(np.empty(0, np.int64), borders, origins)

    def _write_index(self) -> None:
        """PREFIX.idx.partial from what was written aside, chunk by chunk."""
        code = next(code for code, dtype in DTYPE_CODES.items() if dtype == self.dtype)
        self._index.write(struct.pack("<9sQBQQ", MAGIC, 1, code, self.num_sequences, self.num_documents + 1))
        _copy(self._lengths, self._index)
        self._lengths.seek(0)
        total = 0
        while chunk := self._lengths.read(4 * _CHUNK):
            ends = total + np.cumsum(np.frombuffer(chunk, "<i4"), dtype=np.int64) * self.dtype.itemsize
            self._index.write(np.concatenate(([total], ends[:-1])).astype("<i8").data)
            total = int(ends[-1])
        _copy(self._borders, self._index)
        _sync(self._index)

    def _write_sidecar(self, metadata: dict[str, Any], sources: list[dict[str, Any]]) -> None:
        files = {"bin": self._checksums.as_dict(), "idx": checksum_file(self._partial("idx"))}
        if self._has_origins:
            files["sources.npy"] = checksum_file(self._partial("sources.npy"))
        counts = {"dtype": self.dtype.name, "sequences": self.num_sequences, "documents": self.num_documents, "tokens": self.num_tokens}
        counts["largest_id"] = self._largest_id
        with open(self._partial("json"), "wb") as file:
            file.write(sidecar_bytes({**counts, "files": files, "sources": sources, "metadata": metadata}))
            _sync(file)

    def finalize(self, metadata: dict[str, Any] | None = None, sources: list[dict[str, Any]] | None = None) -> None:
        """Gives the files their final names. sources: one {"path": ..., "unit": "bytes" or "rows"} a source number in the origins."""
        self.complete(metadata, sources)
        self.publish()

    def complete(self, metadata: dict[str, Any] | None = None, sources: list[dict[str, Any]] | None = None) -> None:
        """The first half of `finalize`: everything written and synced, under partial names."""
        if self._open_length:
            raise ValueError("end_document was not called for the last document")
        with self._clear_errors():
            self._origins.seek(0)
            write_origins_header(self._origins, self.num_documents)
            for file in (self._tokens, self._origins):
                _sync(file)
            self._write_index()
            self._write_sidecar(metadata or {}, sources or [])

    def publish(self) -> None:
        """The second half: the final names."""
        with self._clear_errors():
            self._name_files()
        self._files.close()

    def _name_files(self) -> None:
        folder = os.path.dirname(self.prefix) or "."
        self._unlink([f"{self.prefix}.{part}" for part in reversed(_FINAL)])
        self._unlink([self._partial(part) for part in (*_SCRATCH, *([] if self._has_origins else ["sources.npy"]))])
        _sync_folder(folder)
        for part in _FINAL:
            if part == "idx":
                _sync_folder(folder)
            if part != "sources.npy" or self._has_origins:
                os.replace(self._tokens_path if part == "bin" else self._partial(part), f"{self.prefix}.{part}")
        self._named = True
        _sync_folder(folder)

    @staticmethod
    def _unlink(paths: list[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def abort(self) -> None:
        """Removes what has no final name yet; after `finalize` or a first `abort` it does nothing."""
        if not self._named:
            self._unlink([self._partial(part) for part in (*_SCRATCH, *_FINAL)])
            self._named = True
            with contextlib.suppress(OSError):  # a full disk: what is buffered cannot be flushed, and need not be
                self._files.close()


def _too_long(prefix: str, tokens: int) -> UserError:
    return UserError(f"{prefix}: a document of {tokens} tokens; the format counts to 2,147,483,647: split the document")


def _open_locked(path: str) -> BinaryIO:
    """Opens for writing, from empty, what no other process has open through this function."""
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "w+b", buffering=WRITE_BYTES))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: another process is writing this dataset; wait for it, or choose another output") from None
            except OSError:
                pass  # a file system without locks
            # Between open and lock its owner may have renamed or removed the file: then this is not ours to empty.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                    file.truncate(0)
                    stack.pop_all()
                    return file


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    source.seek(0)
    while chunk := source.read(8 * _CHUNK):
        target.write(chunk)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
