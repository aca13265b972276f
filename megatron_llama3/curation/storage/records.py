"""Keyed records of documents, grouped by key across tasks: what every deduplication stands on.

A collecting task writes `FOLDER/RANK.records`: its records in partitions by `key % partitions`, so that equal keys of all tasks meet in one
partition. A searching task reads one partition of every rank. Documents are numbered through all tasks, in the input's order.
"""

import os
import tempfile
from collections.abc import Iterator

import numpy as np

from megatron_llama3.curation.storage.files import task_file, whole_file

_SPILL_RECORDS = 1 << 21
_COPY_BYTES = 1 << 22


class RecordWriter:
    """Collects one task's records in bounded memory: sorted runs go to unnamed files, and `close` merges them into the one that counts."""

    def __init__(self, folder: str, rank: int, partitions: int, dtype: np.dtype):
        self.path = task_file(folder, rank, "records")
        self.partitions, self.dtype = partitions, dtype
        self._held: list[np.ndarray] = []
        self._records_held = 0
        self._runs: list[tuple[tempfile._TemporaryFileWrapper, np.ndarray]] = []  # a run, and where its partitions begin, in records
        os.makedirs(folder, exist_ok=True)

    def append(self, records: np.ndarray) -> None:
        """records: [n] of `dtype`, which has a field `key` of uint64."""
        self._held.append(records)
        self._records_held += len(records)
        if self._records_held >= _SPILL_RECORDS:
            self._spill()

    def _spill(self) -> None:
        records = np.concatenate(self._held) if self._held else np.empty(0, self.dtype)
        self._held, self._records_held = [], 0
        partition = records["key"] % np.uint64(self.partitions)
        order = np.argsort(partition, kind="stable")
        run = tempfile.TemporaryFile(dir=os.path.dirname(self.path))  # noqa: SIM115
        run.write(records[order].tobytes())
        self._runs.append((run, np.searchsorted(partition[order], np.arange(self.partitions + 1))))

    def close(self, documents: int) -> None:
        """Publishes the records, with the number of documents that the task has seen, those without records included."""
        self._spill()
        begins = sum(begin for _, begin in self._runs)
        with whole_file(self.path) as file:
            file.write(np.concatenate([[self.partitions, documents], begins]).astype("<u8").tobytes())
            for partition in range(self.partitions):
                for run, begin in self._runs:
                    self._copy(run, file, begin[partition], begin[partition + 1])
        self._runs = []

    def _copy(self, run, file, begin: int, end: int) -> None:
        size = self.dtype.itemsize
        run.seek(begin * size)
        remaining = (end - begin) * size
        while remaining:
            chunk = run.read(min(remaining, _COPY_BYTES))
            file.write(chunk)
            remaining -= len(chunk)


class RecordReader:
    """The records of every rank. `first`: int64 [ranks + 1], the number of each rank's first document among all documents."""

    def __init__(self, folder: str, ranks: int, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.first = np.concatenate([[0], np.cumsum([self._header(rank)[1] for rank in range(ranks)])]).astype(np.int64)

    def _header(self, rank: int) -> np.ndarray:
        with open(task_file(self.folder, rank, "records"), "rb") as file:
            return np.fromfile(file, "<u8", 2)

    def of_rank(self, rank: int, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """(records, their documents' numbers among all documents) of one rank in one partition."""
        with open(task_file(self.folder, rank, "records"), "rb") as file:
            partitions = int(np.fromfile(file, "<u8", 2)[0])
            begins = np.fromfile(file, "<u8", partitions + 1).astype(np.int64)
            file.seek(begins[partition] * self.dtype.itemsize, os.SEEK_CUR)
            records = np.fromfile(file, self.dtype, begins[partition + 1] - begins[partition])
        return records, self.first[rank] + records["document"].astype(np.int64)

    def partition(self, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """(records, document numbers) of all ranks, in the order of documents."""
        parts = [self.of_rank(rank, partition) for rank in range(len(self.first) - 1)]
        return np.concatenate([records for records, _ in parts]), np.concatenate([numbers for _, numbers in parts])

    def buckets(self, partition: int, documents: int) -> Iterator[np.ndarray]:
        """The partition's records in each bucket of that many successive documents; no more than one bucket is held at a time."""
        for begin in range(0, int(self.first[-1]), documents):
            first_rank = int(np.searchsorted(self.first, begin, side="right")) - 1
            parts = [np.empty(0, self.dtype)]
            for rank in range(first_rank, len(self.first) - 1):
                if self.first[rank] >= begin + documents:
                    break
                records, numbers = self.of_rank(rank, partition)
                parts.append(records[(numbers >= begin) & (numbers < begin + documents)])
            yield np.concatenate(parts)
