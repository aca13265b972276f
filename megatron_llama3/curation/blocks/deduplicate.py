"""Exact duplicates: of URLs, of which the newest version stays, and of lines, of which none stays once they are seen too often."""

import os
from datetime import UTC, datetime
from urllib.parse import urlsplit

import numpy as np
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.global_block import DropListed, GlobalBlock, Search
from megatron_llama3.curation.storage.files import save_array, task_file
from megatron_llama3.curation.storage.records import RecordReader, RecordWriter
from megatron_llama3.curation.text.normalised_words import WordHashes

_URL_RECORD = np.dtype([("key", "<u8"), ("document", "<u4"), ("date", "<f8")])
_LINE_RECORD = np.dtype([("key", "<u8"), ("document", "<u4")])
_DEFAULT_PORTS = {"http": 80, "https": 443}


class UrlDedup(GlobalBlock):
    """Keeps the newest document of each URL; of equally new ones, or ones without a date, the first. Documents without a URL stay.

    Dropped: `older_version`. URLs are compared without scheme, user, default port and fragment, the host in lower case.

    url_key, date_key: metadata keys. A date is ISO 8601 (UTC unless it says otherwise) or seconds since 1970.
    """

    def __init__(self, url_key: str = "url", date_key: str = "date"):
        self.url_key, self.date_key = url_key, date_key

    def collect(self, folder: str, partitions: int) -> PipelineStep:
        return WriteUrls(folder, partitions, self.url_key, self.date_key)

    def search(self, folder: str, tasks: int) -> list[Search]:
        return [Search("older", tasks, FindOlder(folder, os.path.join(folder, "listed"), tasks))]

    def apply(self, folder: str) -> PipelineStep:
        return DropListed(folder, os.path.join(folder, "listed"), "older_version")


def normalised_url(url: str) -> str:
    """Host in lower case; without scheme, user, default port and fragment. Query and path as they are: they choose the page."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return url.strip()
    if not parts.netloc:
        return url.strip()
    port = "" if port is None or port == _DEFAULT_PORTS.get(parts.scheme.lower()) else f":{port}"
    return f"{parts.hostname}{port}{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"


def timestamp(date: object) -> float:
    """Seconds since 1970; minus infinity for what is no date."""
    if isinstance(date, int | float) and not isinstance(date, bool):
        return float(date)
    try:
        parsed = datetime.fromisoformat(str(date).strip())
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return -np.inf


class WriteUrls(PipelineStep):
    """First stage: the URL's hash and the date of each document that has a URL."""

    type = "DEDUP"
    name = "URLs"

    def __init__(self, folder: str, partitions: int, url_key: str, date_key: str):
        super().__init__()
        self.folder, self.partitions, self.url_key, self.date_key = folder, partitions, url_key, date_key

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        writer = RecordWriter(self.folder, rank, self.partitions, _URL_RECORD)
        held, count = [], 0
        for count, document in enumerate(data, 1):
            url = document.metadata.get(self.url_key)
            if isinstance(url, str) and url.strip():
                key = xxhash.xxh3_64_intdigest(normalised_url(url))
                held.append((key, count - 1, timestamp(document.metadata.get(self.date_key))))
            if len(held) == 1 << 16:
                writer.append(np.array(held, _URL_RECORD))
                held = []
            yield document
        writer.append(np.array(held, _URL_RECORD))
        writer.close(count)


class FindOlder(PipelineStep):
    """Second stage: all but the newest document of each URL in this task's partition; `RANK.npy`: their sorted numbers."""

    type = "DEDUP"
    name = "older versions"

    def __init__(self, folder: str, output: str, ranks: int):
        super().__init__()
        self.folder, self.output, self.ranks = folder, output, ranks

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        records, numbers = RecordReader(self.folder, self.ranks, _URL_RECORD).partition(rank)
        order = np.lexsort([numbers, -records["date"], records["key"]])
        keys = records["key"][order]
        save_array(task_file(self.output, rank, "npy"), np.sort(numbers[order][1:][keys[1:] == keys[:-1]]))


class LineDedup(GlobalBlock):
    """Removes every copy of a line that is seen more than `times` times in its bucket of `bucket` successive documents, as the paper does.

    Lines are compared as ccNet does, without case, punctuation and accents, and with every number 0; lines without a word stay. A document
    that has no other lines left is dropped (`no_line_left`).

    within: a metadata key (such as `language`); lines count only with those of equal values. spare: metadata key -> values of documents
    that are left alone, `{domain: [code, reasoning]}`: in programs every `#include` is a frequent line.
    """

    def __init__(self, times: int = 6, bucket: int = 30_000_000, within: str | None = None, spare: dict[str, list[str]] | None = None):
        if times < 1 or bucket < 1:
            raise UserError(f"times {times} and bucket {bucket} must be at least 1")
        self.times, self.bucket, self.lines = times, bucket, LineKeys(within, spare or {})

    def collect(self, folder: str, partitions: int) -> PipelineStep:
        return WriteLines(folder, partitions, self.lines)

    def search(self, folder: str, tasks: int) -> list[Search]:
        return [Search("frequent", tasks, FindFrequent(folder, os.path.join(folder, "frequent"), tasks, self.times, self.bucket))]

    def apply(self, folder: str) -> PipelineStep:
        return DropLines(folder, os.path.join(folder, "frequent"), self.bucket, self.lines)


class LineKeys:
    """A document's lines as hashes of their normalised words; `within` and `spare` as in `LineDedup`."""

    def __init__(self, within: str | None, spare: dict[str, list[str]]):
        self.within, self.spare = within, spare

    def of(self, document: Document, words: WordHashes) -> np.ndarray:
        """uint64 [lines]; 0 for a line without a word, and for every line of a document that is spared."""
        lines = document.text.split("\n")
        if any(document.metadata.get(key) in values for key, values in self.spare.items()):
            return np.zeros(len(lines), np.uint64)
        seed = xxhash.xxh3_64_intdigest(str(document.metadata.get(self.within)) if self.within else "")
        hashes = map(words.of_text, lines)
        return np.fromiter((xxhash.xxh3_64_intdigest(line, seed) if line else 0 for line in hashes), np.uint64, len(lines))


class WriteLines(PipelineStep):
    """First stage: the hash of every line."""

    type = "DEDUP"
    name = "lines"

    def __init__(self, folder: str, partitions: int, lines: LineKeys):
        super().__init__()
        self.folder, self.partitions, self.lines = folder, partitions, lines

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        writer = RecordWriter(self.folder, rank, self.partitions, _LINE_RECORD)
        words, count = WordHashes(), 0
        for count, document in enumerate(data, 1):
            keys = self.lines.of(document, words)
            records = np.empty(np.count_nonzero(keys), _LINE_RECORD)
            records["key"], records["document"] = keys[keys != 0], count - 1
            writer.append(records)
            yield document
        writer.close(count)


def _without(lines: list[str], dropped: np.ndarray) -> str:
    """The other lines; of the empty ones around what went, one stays."""
    kept: list[str] = []
    gap = True
    for line, drop in zip(lines, dropped):
        if drop:
            gap = gap or not kept[-1].strip()
        elif line.strip() or not gap:
            kept.append(line)
            gap = False
    return "\n".join(kept).rstrip("\n")


class FindFrequent(PipelineStep):
    """Second stage: the keys seen too often in this task's partition of each bucket; `BUCKET_RANK.npy`: uint64."""

    type = "DEDUP"
    name = "frequent lines"

    def __init__(self, folder: str, output: str, ranks: int, times: int, bucket: int):
        super().__init__()
        self.folder, self.output, self.ranks, self.times, self.bucket = folder, output, ranks, times, bucket

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        reader = RecordReader(self.folder, self.ranks, _LINE_RECORD)
        for bucket, records in enumerate(reader.buckets(rank, self.bucket)):
            keys, counts = np.unique(records["key"], return_counts=True)
            save_array(os.path.join(self.output, f"{bucket:05d}_{rank:05d}.npy"), keys[counts > self.times])


class DropLines(BaseFilter):
    """Third stage: takes the frequent lines of a document's bucket out of it."""

    name = "frequent lines"
    positional = True

    def __init__(self, folder: str, frequent: str, bucket: int, lines: LineKeys):
        super().__init__()
        self.folder, self.frequent, self.bucket, self.lines = folder, frequent, bucket, lines

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self._next = int(RecordReader(self.folder, world_size, _LINE_RECORD).first[rank])
        self._partitions, self._loaded, self._words = world_size, -1, WordHashes()
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        bucket = self._next // self.bucket
        self._next += 1
        if bucket != self._loaded:
            self._loaded, self._keys = bucket, self._load(bucket)
        keys = self.lines.of(doc, self._words)
        found = self._keys[np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)] == keys
        if not found.any():
            return True
        doc.text = _without(doc.text.split("\n"), found)
        return True if keys[~found].any() else (False, "no_line_left")

    def _load(self, bucket: int) -> np.ndarray:
        """Sorted, with a last key that no line has, so that it is never empty."""
        parts = [np.load(os.path.join(self.frequent, f"{bucket:05d}_{rank:05d}.npy")) for rank in range(self._partitions)]
        return np.append(np.sort(np.concatenate(parts)), np.uint64(2**64 - 1))
