"""A worker process of the preprocessing: units of input in, one shard of tokens per unit and key out.

A shard is JOB/000012.json, written last and by renaming, so that its presence means that the shard is whole; and for key i
JOB/000012.i.bin (token ids) and JOB/000012.i.docs (int64 [documents, 4]: tokens, source, start, end). Their checksums are in the .json.
"""

import codecs
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import orjson
from zlib_ng.zlib_ng import crc32

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.dataset_writer import WRITE_BYTES
from megatron_llama3.data.preprocess_inputs import Piece, Source, Unit, decompression_errors, open_source
from megatron_llama3.data.preprocess_lines import (
    BLOCK_BYTES,
    LONG_LINE_BYTES,
    BadRecordError,
    BlankLineError,
    LongLine,
    check_record,
    line_blocks,
    parse_json,
    stream_json,
)
from megatron_llama3.data.preprocess_tokenize import BulkTokenizer, PartEncoder
from megatron_llama3.tokenizer.vocabulary_files import write_whole

_BOM = codecs.BOM_UTF8


class FatalRecordError(Exception):
    """A bad record under `--bad-lines fatal`: (source, byte or row, reason)."""


@dataclass(frozen=True)
class ShardSpec:
    """What every shard of a job has in common."""

    folder: str
    keys: tuple[str, ...]
    dtype: str
    prepend: tuple[int, ...]  # token ids before every document
    append: tuple[int, ...]
    stop_at_bad: bool


@dataclass
class ShardStats:
    """What a shard's .json says. rejected: [source, line within the piece (row of the file), byte, reason]; lines: [source, lines].

    largest_ids: of each key, -1 without tokens.
    """

    largest_ids: list[int]
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    longest: int = 0
    rejected: list[list] = field(default_factory=list)
    lines: list[list[int]] = field(default_factory=list)
    input_crc: int | None = None
    files: dict[str, list[int]] = field(default_factory=dict)


class KeyWriter:
    """The two files of one key in one shard."""

    def __init__(self, path: str, spec: ShardSpec):
        self.path, self._dtype = path, np.dtype(spec.dtype)
        self._prepend, self._append = (np.array(ids, self._dtype) for ids in (spec.prepend, spec.append))
        self._extra = len(spec.prepend) + len(spec.append)
        self._tokens, self._docs = (open(f"{path}.{name}", "wb", buffering=0) for name in ("bin", "docs"))  # noqa: SIM115
        self._crcs = [0, 0]
        self.largest_id = -1
        self._begun = 0

    def _write(self, file: int, data: np.ndarray) -> None:
        view = memoryview(data).cast("B")
        self._crcs[file] = crc32(view, self._crcs[file])
        while len(view):
            view = view[(self._tokens, self._docs)[file].write(view[:WRITE_BYTES]) :]

    def _write_ids(self, ids: np.ndarray) -> None:
        self._write(0, ids)
        self.largest_id = max(self.largest_id, int(ids.max()) if ids.size else -1)

    def add_documents(self, ids: list[np.ndarray], origins: list[tuple[int, int, int]]) -> tuple[int, int]:
        """Whole documents; returns (tokens written, tokens of the longest)."""
        if not ids:
            return 0, 0
        docs = np.empty((len(ids), 4), np.int64)
        docs[:, 0] = np.fromiter(map(len, ids), np.int64, len(ids)) + self._extra
        docs[:, 1:] = origins
        flat = np.empty(int(docs[:, 0].sum()), self._dtype)
        position, before, after = 0, len(self._prepend), len(self._append)
        for document in ids:
            begin = position + before
            end = begin + len(document)
            flat[position:begin] = self._prepend
            flat[begin:end] = document
            position = end + after
            flat[end:position] = self._append
        self._write_ids(flat)
        self._write(1, docs)
        return len(flat), int(docs[:, 0].max())

    def begin(self) -> None:
        """Starts a document too long to hold; `undo` voids it."""
        self._before = (self._tokens.tell(), self._crcs[0], self.largest_id)
        self._begun = 0
        self.extend(self._prepend)

    def extend(self, ids: np.ndarray) -> None:
        self._write_ids(np.ascontiguousarray(ids, self._dtype))
        self._begun += len(ids)

    def end(self, origin: tuple[int, int, int]) -> int:
        self.extend(self._append)
        self._write(1, np.array([[self._begun, *origin]], np.int64))
        return self._begun

    def undo(self) -> None:
        size, self._crcs[0], self.largest_id = self._before
        self._tokens.seek(size)
        self._tokens.truncate()

    def close(self) -> dict[str, list[int]]:
        """{file: [bytes, crc32]} of the two files."""
        sizes = [self._tokens.tell(), self._docs.tell()]
        self._tokens.close()
        self._docs.close()
        return {os.path.basename(f"{self.path}.{name}"): [size, crc] for name, size, crc in zip(("bin", "docs"), sizes, self._crcs)}


class ShardMaker:
    """Turns units into shards. `progress(documents, tokens, bytes of input)` is called after every block."""

    def __init__(self, spec: ShardSpec, sources: list[Source], tokenizer: BulkTokenizer, progress: Callable[[int, int, int], None]):
        self.spec, self.sources, self.tokenizer, self.progress = spec, sources, tokenizer, progress

    def make(self, number: int, unit: Unit) -> None:
        """Writes shard `number`. Raises FatalRecordError at a bad record where the job stops at those."""
        self.stats = ShardStats([], input_crc=unit.input_crc)
        self.writers = {key: KeyWriter(f"{self.spec.folder}/{number:06d}.{i}", self.spec) for i, key in enumerate(self.spec.keys)}
        for piece in unit.pieces:
            self._read_piece(piece)
        for writer in self.writers.values():
            self.stats.files |= writer.close()
            self.stats.largest_ids.append(writer.largest_id)
        write_whole(Path(self.spec.folder, f"{number:06d}.json"), json.dumps(asdict(self.stats)).encode())

    def _read_piece(self, piece: Piece) -> None:
        source = self.sources[piece.source]
        if source.kind == "parquet":
            self._read_rows(piece, source)
            return
        spooled = piece.spool is not None
        with open_source(piece.spool or source.path, "" if spooled else source.compression) as stream:
            try:
                if source.kind == "text":
                    self._read_text(stream, piece.source)
                else:
                    offset = piece.start if spooled else 0
                    self._read_lines(stream, piece, offset)
            except decompression_errors() as error:
                raise UserError(f"{source.path}: the compressed file is damaged or cut off ({error})") from None

    def _read_lines(self, stream, piece: Piece, offset: int) -> None:
        lines = 0
        for position, block in line_blocks(stream, piece.start - offset, piece.end - offset):
            origin = position + offset
            if isinstance(block, LongLine):
                self._long_line(piece.source, lines, origin, block)
                lines += 1
            else:
                lines += self._block(piece.source, lines, origin, block)
        self.stats.lines.append([piece.source, lines])

    def _block(self, source: int, first_line: int, start: int, block: bytes) -> int:
        """Whole lines; returns how many. The hot loop: one JSON parse and one encoding a line, the rest by the block."""
        encode, loads, keys = self.tokenizer.encode, orjson.loads, self.spec.keys
        key, single = keys[0], len(keys) == 1
        ids: dict[str, list[np.ndarray]] = {name: [] for name in keys}
        first_ids, origins, characters, position = ids[key], [], 0, start
        if start == 0 and block.startswith(_BOM):
            block, position = block[len(_BOM) :], len(_BOM)
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, first_line):
            end = position + len(line)
            try:
                text = loads(line)[key] if single else None
            except (ValueError, LookupError, TypeError):
                text = None
            try:
                if type(text) is str and text:
                    first_ids.append(encode(text))
                    characters += len(text)
                else:
                    characters += self._add_checked(parse_json(line), ids)
                origins.append((source, position, end))
            except BadRecordError as error:
                self._reject(source, number, position, error)
            position = end + 1
        self.stats.characters += characters
        self._add(ids, origins, len(block))
        return len(lines)

    def _add_checked(self, record: object, ids: dict[str, list[np.ndarray]]) -> int:
        """Appends the ids of every key of a record, all or none; returns the characters."""
        check_record(record, self.spec.keys)
        for key in self.spec.keys:
            ids[key].append(self.tokenizer.encode(record[key]))
        return sum(len(record[key]) for key in self.spec.keys)

    def _reject(self, source: int, number: int, position: int, error: BadRecordError) -> None:
        if isinstance(error, BlankLineError):
            return
        self.stats.rejected.append([source, number, position, str(error)])
        if self.spec.stop_at_bad:
            raise FatalRecordError(source, position, str(error))

    def _add(self, ids: dict[str, list[np.ndarray]], origins: list[tuple[int, int, int]], input_bytes: int) -> None:
        written = [self.writers[key].add_documents(documents, origins) for key, documents in ids.items()]
        tokens, longest = sum(count for count, _ in written), max(longest for _, longest in written)
        self._count(len(origins), tokens, longest, input_bytes)

    def _count(self, documents: int, tokens: int, longest: int, input_bytes: int) -> None:
        self.stats.documents += documents
        self.stats.tokens += tokens
        self.stats.longest = max(self.stats.longest, longest)
        self.progress(documents, tokens, input_bytes)

    def _long_line(self, source: int, number: int, position: int, line: LongLine) -> None:
        self._long_document(stream_json(line, self.spec.keys), source, number, position, lambda: line.size)

    def _long_document(
        self, texts: Iterator[tuple[str, str | None]], source: int, number: int, start: int, size: Callable[[], int]
    ) -> None:
        """A document that comes in parts, `texts` as of `stream_json`; what it wrote is undone if it turns out bad."""
        encoders: dict[str, PartEncoder] = {}
        for writer in self.writers.values():
            writer.begin()
        try:
            for key, text in texts:
                if text is None:
                    if key in encoders:
                        self.writers[key].undo()
                        self.writers[key].begin()
                    encoders[key] = PartEncoder(self.tokenizer, self.writers[key].extend)
                else:
                    encoders[key].add(text)
                    self.progress(0, 0, len(text))
            for key, encoder in encoders.items():
                encoder.finish()
                if not encoder.characters:
                    raise BadRecordError(f"empty text in {key!r}")
        except BadRecordError as error:
            for writer in self.writers.values():
                writer.undo()
            self._reject(source, number, start, error)
            return
        lengths = [writer.end((source, start, start + size())) for writer in self.writers.values()]
        self.stats.characters += sum(encoder.characters for encoder in encoders.values())
        self._count(1, sum(lengths), max(lengths), 0)

    def _read_text(self, stream, source: int) -> None:
        """A plain text file is one document."""
        data = stream.read(LONG_LINE_BYTES)
        position = 0

        def parts() -> Iterator[tuple[str, str | None]]:
            nonlocal data, position
            decoder = codecs.getincrementaldecoder("utf-8-sig")()
            key = self.spec.keys[0]
            yield key, None
            while data:
                try:
                    text = decoder.decode(data)
                except UnicodeDecodeError as error:
                    raise BadRecordError(f"invalid UTF-8 near byte {position + error.start}") from None
                position += len(data)
                data = stream.read(BLOCK_BYTES)
                yield key, text
            if decoder.getstate()[0]:
                raise BadRecordError(f"invalid UTF-8: cut off at byte {position}")

        self._long_document(parts(), source, 0, 0, lambda: position)

    def _read_rows(self, piece: Piece, source: Source) -> None:
        """The row groups that make up rows start..end of a Parquet file."""
        import pyarrow
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            missing = [key for key in self.spec.keys if key not in names]
            if missing:
                raise UserError(f"{source.path}: no column {missing[0]!r}; it has {', '.join(names)} (--json-keys)")
            row, groups = 0, []
            for i in range(file.num_row_groups):
                if piece.start <= row < piece.end:
                    groups.append(i)
                row += file.metadata.row_group(i).num_rows
            row = piece.start
            try:
                for batch in file.iter_batches(1024, row_groups=groups, columns=list(self.spec.keys), use_threads=False):
                    self._rows(piece.source, row, batch.to_pylist())
                    row += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{source.path}: damaged near row {row} ({error})") from None

    def _rows(self, source: int, first: int, records: list[dict]) -> None:
        ids: dict[str, list[np.ndarray]] = {key: [] for key in self.spec.keys}
        origins, characters = [], 0
        for row, record in enumerate(records, first):
            try:
                characters += self._add_checked(record, ids)
                origins.append((source, row, row + 1))
            except BadRecordError as error:
                self._reject(source, row, row, error)
        self.stats.characters += characters
        self._add(ids, origins, characters)


def serve(connection: Connection, maker_of: Callable[[Callable[[int, int, int], None]], ShardMaker], parent: int) -> None:
    """The life of a worker: (number, unit) in; ("progress", ...), ("done", number), ("bad", ...) or ("error", line) out."""
    maker = maker_of(lambda *counts: connection.send(("progress", *counts)))
    while (task := _receive(connection, parent)) is not None:
        try:
            maker.make(*task)
            connection.send(("done", task[0]))
        except FatalRecordError as error:
            connection.send(("bad", *error.args))
        except UserError as error:
            connection.send(("error", str(error)))
        except OSError as error:
            connection.send(("error", f"{error.filename or maker.spec.folder}: {error.strerror or error}"))


def _receive(connection: Connection, parent: int) -> tuple | None:
    """The next task; ends the process where the parent is gone, so that no orphan goes on writing."""
    while not connection.poll(1.0):
        if os.getppid() != parent:
            os._exit(1)
    try:
        return connection.recv()
    except EOFError:
        os._exit(1)
