"""Near-duplicate documents by MinHash, in datatrove's four stages: signatures, candidates, clusters, filter.

Signatures are rensa's, over hashes of word n-grams. Documents that agree in all rows of a band are candidates; a candidate pair counts if
the share of equal signature slots, an estimate of the Jaccard similarity, reaches the threshold. Of a cluster the earliest document stays.
"""

import os
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.global_block import DropListed, GlobalBlock, Search
from megatron_llama3.curation.storage.files import save_array, task_file, whole_file
from megatron_llama3.curation.storage.records import RecordReader, RecordWriter
from megatron_llama3.curation.text.normalised_words import WordHashes, word_ngrams

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a task is one core: rensa would take the whole machine for each

_RECORD = np.dtype([("key", "<u8"), ("document", "<u4")])
_BATCH = 512
_VERIFY_PAIRS = 1 << 15


class MinhashDedup(GlobalBlock):
    """Drops documents (`near_duplicate`) of a Jaccard similarity of `threshold` or more, by their word n-grams, to an earlier document.

    A pair of similarity s becomes a candidate with probability 1 - (1 - s^rows)^bands, and is then judged by bands * rows slots, kept as
    bytes.

    ngram: words in one. within: a metadata key (such as `language`); only documents of equal values are compared. seed: of the hashes.
    """

    def __init__(self, threshold: float = 0.72, ngram: int = 5, bands: int = 32, rows: int = 8, within: str | None = None, seed: int = 1):
        if not 0 < threshold <= 1:
            raise UserError(f"threshold {threshold} must be above 0 and at most 1")
        if ngram < 1 or bands < 1 or rows < 2 or rows % 2 or seed < 0:
            raise UserError(f"ngram {ngram} and bands {bands} must be at least 1, rows {rows} even, seed {seed} at least 0")
        self.threshold, self.ngram, self.bands, self.rows, self.within, self.seed = threshold, ngram, bands, rows, within, seed

    def collect(self, folder: str, partitions: int) -> PipelineStep:
        return WriteSignatures(folder, partitions, self.ngram, self.bands, self.rows, self.within, self.seed)

    def search(self, folder: str, tasks: int) -> list[Search]:
        pairs, listed = os.path.join(folder, "pairs"), os.path.join(folder, "listed")
        return [
            Search("pairs", tasks, FindPairs(folder, pairs, tasks, self.bands * self.rows, self.threshold)),
            Search("clusters", 1, FindClusters(pairs, listed, tasks)),
        ]

    def apply(self, folder: str) -> PipelineStep:
        return DropListed(folder, os.path.join(folder, "listed"), "near_duplicate")


def signatures(texts: list[bytes], ngram: int, slots: int, seed: int) -> np.ndarray:
    """uint32 [texts, slots]. texts: word hashes (`WordHashes`); none may be empty."""
    from rensa import RMinHash

    hashes, begins = word_ngrams(texts, ngram)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, begins, slots, seed)
    return np.array(matrix.to_rows(), np.uint32)


def band_keys(signature: np.ndarray, bands: int) -> np.ndarray:
    """uint64 [documents, bands]: equal where all rows of the band are."""
    rows = np.ascontiguousarray(signature).view(np.uint64).reshape(len(signature), bands, -1)
    keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), rows.shape[:2]).copy()
    for row in range(rows.shape[2]):
        keys ^= rows[:, :, row]
        keys *= np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


class WriteSignatures(PipelineStep):
    """First stage: `RANK.records`, a key for each band, and `RANK.signatures`, uint8 [documents, slots] (zeros for no words)."""

    type = "DEDUP"
    name = "MinHash signatures"

    def __init__(self, folder: str, partitions: int, ngram: int, bands: int, rows: int, within: str | None, seed: int):
        super().__init__()
        self.folder, self.partitions = folder, partitions
        self.ngram, self.bands, self.rows, self.within, self.seed = ngram, bands, rows, within, seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        writer = RecordWriter(self.folder, rank, self.partitions, _RECORD)
        words = WordHashes()
        count = 0
        with whole_file(task_file(self.folder, rank, "signatures")) as file:
            batch: list[tuple[int, bytes, str]] = []
            for count, document in enumerate(data, 1):
                batch.append((count - 1, words.of_text(document.text), self._group(document)))
                if len(batch) == _BATCH:
                    self._write(batch, writer, file)
                    batch = []
                yield document
            self._write(batch, writer, file)
        writer.close(count)

    def _group(self, document: Document) -> str:
        return str(document.metadata.get(self.within)) if self.within else ""

    def _write(self, batch: list[tuple[int, bytes, str]], writer: RecordWriter, file) -> None:
        slots = np.zeros((len(batch), self.bands * self.rows), np.uint8)
        worded = np.array([position for position, (_, text, _) in enumerate(batch) if text], np.int64)
        if len(worded):
            signature = signatures([batch[position][1] for position in worded], self.ngram, slots.shape[1], self.seed)
            slots[worded] = signature.astype(np.uint8)
            records = np.empty((len(worded), self.bands), _RECORD)
            records["key"] = band_keys(signature, self.bands)
            if self.within:
                records["key"] ^= np.array([[xxhash.xxh3_64_intdigest(batch[position][2])] for position in worded], np.uint64)
            records["document"] = np.array([[batch[position][0]] for position in worded])
            writer.append(records.ravel())
        file.write(slots.tobytes())


class FindPairs(PipelineStep):
    """Second stage: pairs of equal band keys in this task's partition, verified; `RANK.npy`: int64 [pairs, 2], (document, earliest)."""

    type = "DEDUP"
    name = "MinHash pairs"

    def __init__(self, folder: str, output: str, ranks: int, slots: int, threshold: float):
        super().__init__()
        self.folder, self.output, self.ranks, self.slots, self.threshold = folder, output, ranks, slots, threshold

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        reader = RecordReader(self.folder, self.ranks, _RECORD)
        records, numbers = reader.partition(rank)
        forest = np.empty((0, 2), np.int64)
        for pairs in self._candidates(records["key"], numbers):
            similar = _similarity(self._slots(reader.first, pairs[:, 0]), self._slots(reader.first, pairs[:, 1])) >= self.threshold
            forest = components(np.concatenate([forest, pairs[similar]]))
        save_array(task_file(self.output, rank, "npy"), forest)

    def _candidates(self, keys: np.ndarray, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """[at most _VERIFY_PAIRS, 2]: in each group of equal keys, every document with the one before it and with the first."""
        order = np.argsort(keys, kind="stable")
        keys, numbers = keys[order], numbers[order]
        later = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        first = np.searchsorted(keys, keys[later])
        chain, star = np.stack([numbers[later], numbers[later - 1]], 1), np.stack([numbers[later], numbers[first]], 1)
        pairs = np.unique(np.concatenate([chain, star]), axis=0)
        for begin in range(0, len(pairs), _VERIFY_PAIRS):
            yield pairs[begin : begin + _VERIFY_PAIRS]

    def _slots(self, first: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """uint8 [documents, slots], read from the ranks' files."""
        slots = np.empty((len(documents), self.slots), np.uint8)
        order = np.argsort(documents, kind="stable")
        cuts = np.searchsorted(documents[order], first)
        for rank, (begin, end) in enumerate(pairwise(cuts)):
            if end > begin:
                mapped = np.memmap(task_file(self.folder, rank, "signatures"), np.uint8, "r").reshape(-1, self.slots)
                slots[order[begin:end]] = mapped[documents[order[begin:end]] - first[rank]]
        return slots


def _similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The Jaccard estimate of rows of byte slots: different slots share their low byte by chance once in 256 times."""
    chance = 1 / 256
    return ((one == other).mean(1) - chance) / (1 - chance)


def components(pairs: np.ndarray) -> np.ndarray:
    """int64 [n, 2]: each number that is not the smallest of its connected component, sorted, with that smallest one."""
    nodes, compact = np.unique(pairs, return_inverse=True)
    edges = coo_array((np.ones(len(pairs), bool), compact.reshape(-1, 2).T), shape=(len(nodes), len(nodes)))
    _, component = connected_components(edges, directed=False)
    first = np.unique(component, return_index=True)[1][component]
    later = np.flatnonzero(first != np.arange(len(nodes)))
    return np.stack([nodes[later], nodes[first[later]]], 1)


class FindClusters(PipelineStep):
    """Third stage, one task: clusters of all pairs; `00000.npy`: the documents to drop. Its memory grows with the duplicates only."""

    type = "DEDUP"
    name = "MinHash clusters"

    def __init__(self, pairs: str, output: str, partitions: int):
        super().__init__()
        self.pairs, self.output, self.partitions = pairs, output, partitions

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        forest = np.empty((0, 2), np.int64)
        for partition in range(self.partitions):
            forest = components(np.concatenate([forest, np.load(task_file(self.pairs, partition, "npy"))]))
        save_array(task_file(self.output, 0, "npy"), forest[:, 0])
