"""One dataset as an endless stream of tokens: its documents shuffled anew each epoch, laid end to end.

The stream depends on the dataset's content, the seed and the epoch, and on nothing else; a place in it is the number of tokens before it.
In which order training reads it, `mixing.py` says.
"""

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.indexed_dataset import IndexedDataset

_CACHE_FROM_DOCUMENTS = 4_000_000  # below, building takes less than a quarter of a second


class Spans(NamedTuple):
    """The pieces of documents that make up a stretch of the stream: arrays [n] of document numbers, first token in each, tokens taken."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class PackedSequence(NamedTuple):
    """tokens int64 [n]; documents int64 [n]: 0 for the tokens of the first document in the sequence, 1 for the next, ..."""

    tokens: np.ndarray
    documents: np.ndarray


def shuffled(count: int, key: str) -> np.ndarray:
    """A permutation of 0..count-1 that depends on `key` alone, int64 [count].

    Random numbers with the index in their lowest bits, sorted: no ties, so no dependence on numpy's sort; Philox's raw output is fixed by
    its specification, while numpy may change `permutation` between versions.
    """
    bits = np.uint64(max(count - 1, 1).bit_length())
    index_mask = (np.uint64(1) << bits) - np.uint64(1)
    random = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")).random_raw(count)
    numbers = (random & ~index_mask) | np.arange(count, dtype=np.uint64)
    numbers.sort()
    return (numbers & index_mask).astype(np.int64)


class PackedDocuments:
    """Documents first to last (not included) of a dataset as a stream. `tokens_per_epoch` is its period.

    With `cache_path`, the order of millions of documents is kept there and memory-mapped, so that the ranks of a node share it.
    Raises UserError where these documents hold no token.
    """

    def __init__(self, dataset: IndexedDataset, first: int, last: int, seed: int, cache_path: str | None = None) -> None:
        self.dataset, self.first, self.last, self.seed, self.cache_path = dataset, first, last, seed, cache_path
        self._lengths = dataset.document_lengths[first:last]
        self.tokens_per_epoch = int(self._lengths.sum(dtype=np.int64))
        if not self.tokens_per_epoch:
            raise UserError(f"{dataset.prefix}: documents {first} to {last} of its {dataset.num_documents} hold no token; leave it out")
        self._epochs: dict[int, np.ndarray] = {}

    def _build_epoch(self, epoch: int) -> np.ndarray:
        order = shuffled(self.last - self.first, f"{self.dataset.fingerprint} {self.seed} {epoch}")
        return np.stack((order + self.first, np.cumsum(self._lengths[order], dtype=np.int64)))

    def _epoch(self, epoch: int) -> np.ndarray:
        """int64 [2, documents]: the documents in their order, and where each ends, in tokens from the epoch's begin."""
        if epoch not in self._epochs:
            if self.cache_path is None or self.last - self.first < _CACHE_FROM_DOCUMENTS:
                built = self._build_epoch(epoch)
            else:
                name = f"{self.dataset.fingerprint}-{self.first}-{self.last}-seed{self.seed}-epoch{epoch}.npy"
                built = load_or_build(Path(self.cache_path) / name, (2, self.last - self.first), lambda: self._build_epoch(epoch))
            self._epochs = {e: kept for e, kept in self._epochs.items() if e == epoch - 1} | {epoch: built}
        return self._epochs[epoch]

    def spans(self, position: int, length: int) -> Spans:
        """The pieces of documents in `length` tokens from `position`; an epoch's end is a document's end."""
        pieces = []
        while length:
            epoch, offset = divmod(position, self.tokens_per_epoch)
            stop = min(offset + length, self.tokens_per_epoch)
            documents, ends = self._epoch(epoch)
            begin = int(np.searchsorted(ends, offset, side="right"))
            end = int(np.searchsorted(ends, stop, side="left")) + 1
            document, span_ends = documents[begin:end], ends[begin:end]
            span_starts = span_ends - self._lengths[document - self.first]
            taken = np.minimum(span_ends, stop) - np.maximum(span_starts, offset)
            skipped = np.maximum(offset - span_starts, 0)
            kept = taken > 0  # documents without tokens take no number
            pieces.append((document[kept], skipped[kept], taken[kept]))
            position, length = position + stop - offset, length - (stop - offset)
        return Spans(*(np.concatenate(arrays) for arrays in zip(*pieces)))

    def read_ahead(self, position: int, length: int) -> None:
        """Has the system begin to read what `read` will want; does not wait for it."""
        spans = self.spans(position, length)
        self.dataset.read_ahead(self.dataset.document_starts(spans.documents) + spans.starts, spans.lengths)

    def read(self, position: int, length: int, vocab_size: int) -> PackedSequence:
        """`length` tokens from `position`. Raises UserError where an id is not below vocab_size."""
        spans = self.spans(position, length)
        ordinal = np.repeat(np.arange(len(spans.lengths)), spans.lengths)
        begins = np.cumsum(spans.lengths) - spans.lengths
        sources = self.dataset.document_starts(spans.documents) + spans.starts - begins
        tokens = self.dataset.gather(sources[ordinal] + np.arange(length)).astype(np.int64)
        if tokens.max() >= vocab_size or tokens.min() < 0:
            bad = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
            raise UserError(
                f"{self.dataset.prefix}: document {spans.documents[ordinal[bad]]} holds token id {tokens[bad]}, outside the model's "
                f"vocabulary of {vocab_size} entries; set --vocab-size, or preprocess with the model's tokenizer"
            )
        return PackedSequence(tokens, ordinal)


def load_or_build(path: Path, shape: tuple[int, ...], build: Callable[[], np.ndarray]) -> np.ndarray:
    """The int64 array in `path`, memory-mapped, built and stored first where it is not there.

    Ranks that start together may all build it: each writes under a name of its own and renames, so every reader sees a whole file.
    """
    try:
        if (array := _load(path, shape)) is None:
            _write_aside(path, build())
            array = _load(path, shape)
    except OSError as error:
        raise UserError(f"--data-cache-path: cannot use {path}: {error.strerror}; choose another folder") from error
    if array is None:
        raise UserError(f"--data-cache-path: {path} cannot be read back after writing; choose another folder")
    return array


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array, or None where there is none of that shape."""
    try:
        array = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.int64 else None


def _write_aside(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
