"""The folder of a preprocessing job: its lock, its description, its shards; and their assembly into the final datasets.

PREFIX.preprocess/job.json says what the job is: a later run continues it only if it is the same. Shards are found again by their .json
and trusted by their checksums, so neither a kill nor a power cut leaves anything that looks whole and is not. An assembled shard's tokens
are in tokens.KEY.bin, which becomes PREFIX.bin, and its own .bin is removed: half the disk, and its memory serves the next shard.
"""

import fcntl
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.indexed_dataset import IndexedDatasetWriter
from megatron_llama3.data.preprocess_inputs import Source, Unit
from megatron_llama3.data.preprocess_worker import ShardSpec, ShardStats
from megatron_llama3.tokenizer.vocabulary_files import write_whole


class JobFolder:
    """PREFIX.preprocess, locked while in its `with`. Left without `remove`, it stays for a later run to continue."""

    def __init__(self, prefix: str):
        self.path = Path(f"{prefix}.preprocess")
        self.assembled = 0  # leading shards whose tokens an earlier run has put into the token files
        self._lock: int | None = self._locked_folder()

    def _locked_folder(self) -> int:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"--output-prefix: cannot make {self.path}: {error.strerror}") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UserError(f"{self.path}: another run is writing this output; wait for it, or change --output-prefix") from None
            # A run that ends removes its folder: make sure that the one locked is the one there now.
            if self.path.exists() and os.path.samestat(os.stat(self.path), os.fstat(descriptor)):
                return descriptor
            os.close(descriptor)

    def __enter__(self) -> "JobFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets go of the lock. A forked worker does so at once: the lock must end with the parent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def open_job(self, description: dict, unit_bytes: int) -> int:
        """Starts or continues the job; returns the size of its units. Raises UserError where another, unfinished job is here."""
        file = self.path / "job.json"
        if file.exists():
            known = json.loads(file.read_bytes())
            if known["description"] == description:
                return known["unit_bytes"]
            differing = [key for key in description if known["description"].get(key) != description[key]]
            raise UserError(
                f"{self.path} holds an unfinished job with another {' and '.join(differing)}; run that command again, or remove the folder"
            )
        write_whole(file, json.dumps({"description": description, "unit_bytes": unit_bytes}).encode())
        return unit_bytes

    def stats(self, number: int) -> ShardStats:
        return ShardStats(**json.loads((self.path / f"{number:06d}.json").read_bytes()))

    def has_shard(self, number: int, unit: Unit) -> bool:
        """Whether shard `number` is there and whole. Raises UserError if it was made from other standard input."""
        try:
            stats = self.stats(number)
        except (OSError, ValueError, TypeError):
            return False
        if stats.input_crc != unit.input_crc:
            raise UserError(f"--input -: not what the interrupted run was given (part {number} differs); remove {self.path} to start over")
        return number < self.assembled or all(_bytes_and_crc(self.path / name) == expected for name, expected in stats.files.items())

    def tokens_path(self, key: int) -> Path:
        """Where the tokens of key number `key` are assembled."""
        return self.path / f"tokens.{key}.bin"

    def keep_assembled(self, keys: int) -> None:
        """Sets `assembled`, and cuts the token files behind the last of these shards."""
        ends = [0] * keys
        while (sizes := self._assembled_sizes(self.assembled, ends)) is not None:
            ends = [end + size for end, size in zip(ends, sizes)]
            self.assembled += 1
        for key, end in enumerate(ends):
            with open(self.tokens_path(key), "ab") as file:
                file.truncate(end)

    def _assembled_sizes(self, number: int, begins: list[int]) -> list[int] | None:
        """Bytes of a shard in each token file; None if its tokens are not there, whole, from `begins`."""
        sizes = []
        try:
            files = self.stats(number).files
            for key, begin in enumerate(begins):
                shard = f"{number:06d}.{key}"
                tokens, docs = files[f"{shard}.bin"], files[f"{shard}.docs"]
                moved = not (self.path / f"{shard}.bin").exists()
                if not moved or _bytes_and_crc(self.tokens_path(key), begin, tokens[0]) != tokens:
                    return None
                if _bytes_and_crc(self.path / f"{shard}.docs") != docs:
                    return None
                sizes.append(tokens[0])
        except (OSError, ValueError, TypeError, LookupError):
            return None
        return sizes

    def remove(self) -> None:
        """For a job that is done."""
        shutil.rmtree(self.path, ignore_errors=True)


def _bytes_and_crc(path: Path, begin: int = 0, limit: int = sys.maxsize) -> list[int]:
    """[bytes, crc32] of a file from `begin`, of `limit` bytes at most; [-1, 0] where there is no such file."""
    size = crc = 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            while chunk := file.read(min(4 << 20, limit - size)):
                size, crc = size + len(chunk), crc32(chunk, crc)
    except FileNotFoundError:
        return [-1, 0]
    return [size, crc]


@dataclass
class Summary:
    """Totals of a job, over its keys."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    longest: int = 0
    rejected: int = 0


class Assembler:
    """Appends shards, in order, to the datasets and to the report of rejected records. Leaving its `with` discards what is unfinished."""

    def __init__(self, folder: JobFolder, prefix: str, spec: ShardSpec, sources: list[Source]):
        self._folder, self._spec, self._sources = folder, spec, sources
        self.outputs = [f"{prefix}_{key}_document" for key in spec.keys]
        folder.keep_assembled(len(spec.keys))
        self._writers = [
            IndexedDatasetWriter(output, np.dtype(spec.dtype), folder.tokens_path(key)) for key, output in enumerate(self.outputs)
        ]
        self.report_path = Path(f"{prefix}.rejected.jsonl")
        self._report = open(folder.path / "rejected.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self._lines_before: dict[int, int] = {}
        self.summary = Summary()

    def __enter__(self) -> "Assembler":
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers:
            writer.abort()

    def append(self, number: int, unit: Unit) -> None:
        stats = self._folder.stats(number)
        for key, writer in enumerate(self._writers):
            shard = self._folder.path / f"{number:06d}.{key}"
            docs = np.fromfile(f"{shard}.docs", np.int64).reshape(-1, 4)
            if number < self._folder.assembled:
                writer.add_written(docs[:, 0], docs[:, 1:], stats.largest_ids[key])
            else:
                writer.add_file(f"{shard}.bin", docs[:, 0], docs[:, 1:], stats.largest_ids[key])
                os.unlink(f"{shard}.bin")
        for source, row, byte, reason in stats.rejected:
            self._reject(source, unit, row, byte, reason)
        for source, lines in stats.lines:
            if source in self._lines_before or self._start_in(source, unit) == 0:
                self._lines_before[source] = self._lines_before.get(source, 0) + lines
        total = self.summary
        total.documents += stats.documents
        total.tokens += stats.tokens
        total.characters += stats.characters
        total.longest = max(total.longest, stats.longest)
        total.rejected += len(stats.rejected)

    def _start_in(self, source: int, unit: Unit) -> int:
        return next(piece.start for piece in unit.pieces if piece.source == source)

    def _reject(self, source: int, unit: Unit, row: int, byte: int, reason: str) -> None:
        path, kind = self._sources[source].path, self._sources[source].kind
        if kind == "jsonl" and source not in self._lines_before:
            start = self._start_in(source, unit)
            self._lines_before[source] = count_lines(path, start) if start else 0
        place = {"row": row} if kind == "parquet" else {"line": self._lines_before.get(source, 0) + row + 1, "byte": byte}
        self._report.write(json.dumps({"file": path, **place, "reason": reason}) + "\n")

    def finalize(self, metadata: dict) -> None:
        """Syncs everything and gives it its final names."""
        self._report.close()
        if self.summary.rejected:
            shutil.copyfile(self._report.name, f"{self._report.name}.whole")
            os.replace(f"{self._report.name}.whole", self.report_path)
        else:
            self.report_path.unlink(missing_ok=True)
        sources = [{"path": source.path, "unit": "rows" if source.kind == "parquet" else "bytes"} for source in self._sources]
        for writer in self._writers:
            writer.complete(metadata, sources)
        for writer in self._writers:
            writer.publish()


def count_lines(path: str, end: int) -> int:
    """Newlines in the first `end` bytes of a file."""
    lines = 0
    with open(path, "rb", buffering=0) as file:
        while end > 0 and (chunk := file.read(min(end, 4 << 20))):
            lines += chunk.count(b"\n")
            end -= len(chunk)
    return lines
