"""The input, cut into tasks by bytes. What is no document is listed with the reason: never fatal, never dropped in silence."""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.observe import Tally
from megatron_llama3.curation.storage.files import task_file, whole_file
from megatron_llama3.data.preprocess_inputs import Source, decompression_errors, expand_inputs, open_source
from megatron_llama3.data.preprocess_lines import BadRecordError, BlankLineError, LongLine, check_record, line_blocks, parse_json

MAX_RECORD_BYTES = 256 << 20
_FORMATS = ("jsonl", "files", "warc")
_DECLARES_CHARSET = re.compile(rb"<meta[^>]*charset|<\?xml[^>]*encoding", re.IGNORECASE)


@dataclass(frozen=True)
class Input:
    """The YAML's `input`. path: files, folders or globs. format: `jsonl`; `files`, each of which is one document; or `warc`."""

    path: tuple[str, ...]
    format: str = "jsonl"
    text_key: str = "text"
    id_key: str = "id"

    def sources(self) -> list[Source]:
        """In the order given. Raises UserError for a path that is not there."""
        if self.format not in _FORMATS:
            raise UserError(f"input.format is {self.format!r}: choose from {', '.join(_FORMATS)}")
        expanded = []
        for path in self.path:
            try:
                expanded += expand_inputs([os.path.abspath(path)], "auto" if self.format == "jsonl" else "text")
            except UserError as error:
                raise UserError(f"input.path: {path}: nothing there to read as {self.format}") from error
        if wrong := [source.path for source in expanded if self.format == "jsonl" and source.kind != "jsonl"]:
            raise UserError(f"input.path: {wrong[0]} is not .jsonl, .json or .ndjson (also .gz, .zst); or 'format: files', 'warc'")
        return expanded


class ReadInput(PipelineStep):
    """A rank's share of the sources: successive bytes, so that the documents' order is the input's under any number of tasks.

    Lists what it rejects in `FOLDER/RANK.jsonl` ({"path", "byte", "reason"} a line) and counts it in `tally`.
    """

    type = "READER"
    name = "input"

    def __init__(self, sources: list[Source], spec: Input, rejected: str):
        super().__init__()
        self.sources, self.spec, self.rejected = sources, spec, rejected
        self.tally = Tally("input")

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with whole_file(task_file(self.rejected, rank, "jsonl")) as rejected:
            for source, start, end in shares(self.sources, rank, world_size, self.spec.format):
                path = spelt(source.path)
                for byte, found in self._read(source, start, end):
                    if isinstance(found, Document):
                        self.tally.enters(found)
                        self.tally.leaves(found)
                        yield found
                    else:
                        rejected.write(orjson.dumps({"path": path, "byte": byte, "reason": found}, option=orjson.OPT_APPEND_NEWLINE))
                        self.tally.drops(f"{path}:{byte}", found, re.split(": | at byte ", found)[0], 0)

    def _read(self, source: Source, start: int, end: int) -> Iterator[tuple[int, Document | str]]:
        """(byte, a document or why there is none)."""
        byte = start
        try:
            with open_source(source.path, source.compression) as stream:
                if self.spec.format == "files":
                    yield 0, self._file(source, stream.read(MAX_RECORD_BYTES + 1))
                    return
                if self.spec.format == "warc":
                    for byte, found in warc_pages(stream):
                        if isinstance(found, Document):
                            found.metadata["file_path"] = spelt(source.path)
                        yield byte, found
                    return
                for begin, block in line_blocks(stream, start, end):
                    for byte, line in _lines(begin, block):
                        if (found := self._line(source, byte, line)) is not None:
                            yield byte, found
        except (*decompression_errors(), OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is in the file
                raise
            yield byte, f"damaged file, its rest is lost: {error}"

    def _file(self, source: Source, content: bytes) -> Document | str:
        try:
            if len(content) > MAX_RECORD_BYTES:
                raise BadRecordError(f"longer than {MAX_RECORD_BYTES >> 20} MiB")
            text = decoded_file(content)
            if not text.strip():
                raise BadRecordError("empty text")
        except UnicodeDecodeError as error:
            return f"invalid UTF-8 at byte {error.start}"
        except BadRecordError as error:
            return str(error)
        return Document(text, spelt(source.path), metadata={"file_path": spelt(source.path)})

    def _line(self, source: Source, byte: int, line: bytes | str) -> Document | str | None:
        """The document, the reason why it is none, or None for a blank line."""
        if isinstance(line, str):
            return line
        try:
            record = parse_json(line)
            check_record(record, [self.spec.text_key])
        except BlankLineError:
            return None
        except BadRecordError as error:
            return str(error)
        text = record.pop(self.spec.text_key)
        metadata = record.pop("metadata", None)
        identity = record.pop(self.spec.id_key, None)
        metadata = metadata if isinstance(metadata, dict) else {"metadata": metadata} if metadata is not None else {}
        identity = spelt(f"{Path(source.path).name}:{byte}" if identity is None else str(identity))
        return Document(text, identity, metadata={**_spelt_out({**metadata, **record}), "file_path": spelt(source.path)})


def spelt(name: str) -> str:
    """A name as UTF-8 can spell it: the bytes of a path that are none, and lone surrogates, become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _spelt_out(metadata: dict) -> dict:
    """Lone surrogates, which no output could hold, become `?`."""
    try:
        orjson.dumps(metadata)
        return metadata
    except TypeError:
        return json.loads(json.dumps(metadata, ensure_ascii=False).encode("utf-8", "replace"))


def decoded_file(content: bytes) -> str:
    """UTF-8, or what the page says of itself. Raises UnicodeDecodeError for anything else."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if not _DECLARES_CHARSET.search(content[:4096]):
            raise
        return bytes_to_str(content, detect_encoding(content, from_html_meta=True))


def warc_pages(stream: BinaryIO) -> Iterator[tuple[int, Document | str]]:
    """(byte, the page or why it is none) of each response in a WARC file: `url`, `date` and `content_type` become metadata.

    Text is decoded as the server says, else as the page says, else as it looks.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    for record in ArchiveIterator(stream, record_types=WarcRecordType.response, parse_http=True):
        status = record.http_headers.status_code if record.http_headers else None
        kind = record.http_content_type or ""
        expected = record.content_length
        content = record.reader.read(MAX_RECORD_BYTES + 1)
        if status is not None and status != 200:
            yield record.stream_pos, f"HTTP status {status}"
        elif not kind.startswith("text/") and "html" not in kind:
            yield record.stream_pos, f"not text but {kind or 'of no type'}"
        elif len(content) > MAX_RECORD_BYTES:
            yield record.stream_pos, f"longer than {MAX_RECORD_BYTES >> 20} MiB"
        elif len(content) < expected:
            yield record.stream_pos, "cut off"
        else:
            text = bytes_to_str(content, record.http_charset or detect_encoding(content, from_html_meta=True))
            metadata = {"url": record.headers.get("WARC-Target-URI"), "date": record.headers.get("WARC-Date"), "content_type": kind}
            yield record.stream_pos, Document(text, record.record_id, metadata=metadata) if text.strip() else "empty text"


def shares(sources: list[Source], rank: int, ranks: int, kind: str) -> Iterator[tuple[Source, int, int]]:
    """(source, first byte, end) of the lines that begin in the rank's share of all bytes; a file that cannot be divided goes whole."""
    sizes = [max(source.size, 1) for source in sources]
    total = sum(sizes)
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    begin = 0
    for source, size in zip(sources, sizes):
        if source.divisible and kind == "jsonl":
            if (start := max(low - begin, 0)) < (end := min(high - begin, size)):
                yield source, start, end
        elif low <= begin < high:
            yield source, 0, sys.maxsize
        begin += size


def _lines(begin: int, block: bytes | LongLine) -> Iterator[tuple[int, bytes | str]]:
    """(byte, line) of a block of whole lines; a text instead of a line that is too long."""
    if isinstance(block, LongLine):
        kept = bytearray()
        for chunk in block:
            if len(kept) <= MAX_RECORD_BYTES:
                kept += chunk
        yield begin, bytes(kept) if len(kept) <= MAX_RECORD_BYTES else f"longer than {MAX_RECORD_BYTES >> 20} MiB"
        return
    for line in block.split(b"\n"):
        yield begin, line
        begin += len(line) + 1
