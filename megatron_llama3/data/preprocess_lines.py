"""Lines of JSONL out of any stream in bounded memory, a line of a gigabyte included.

`line_blocks` gives blocks of whole lines; a line too long to hold comes as a `LongLine`, and `stream_json` reads the wanted strings out of
it piece by piece, checking the JSON around them as strictly as a parser that sees it whole.
"""

import codecs
import io
import json
import re
from collections.abc import Collection, Iterator

import orjson

BLOCK_BYTES = 1 << 20  # small enough for a processor's cache
LONG_LINE_BYTES = 16 << 20
_MAX_SKELETON_BYTES = 64 << 20
_MAX_OTHER_STRING = 1 << 20

# Possessive, so that a long string costs no backtracking memory.
_STRING_UNITS = re.compile(rb'(?:[^"\\]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+')
_HIGH_SURROGATE_END = re.compile(rb"(?<!\\)((?:\\\\)*)\\u[dD][89abAB][0-9a-fA-F]{2}$")
_NESTING = re.compile(rb"[{}\[\]]")


class BadRecordError(Exception):
    """A record that cannot become a document; its message is the reason that the report gives."""


class BlankLineError(BadRecordError):
    """An empty line: no record at all, so that none is lost by leaving it out."""


class LongLine:
    """The bytes of one line, without newline, as an iterator of chunks. Its end sets `size`, `length` (with newline) and `rest`."""

    def __init__(self, stream: io.BufferedIOBase, begun: bytes):
        self._stream, self._next = stream, begun
        self.length = self.size = 0
        self.rest = b""

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        chunk, end = self._next, self._next.find(b"\n")
        if not chunk:
            raise StopIteration
        if end >= 0:
            self.size = self.length + end
            self.length = self.size + 1
            self._next, self.rest = b"", chunk[end + 1 :]
            return chunk[:end]
        self.length += len(chunk)
        self.size = self.length
        self._next = self._stream.read(BLOCK_BYTES)
        return chunk


def line_blocks(stream: io.BufferedIOBase, start: int, end: int) -> Iterator[tuple[int, bytes | LongLine]]:
    """(offset, whole lines) for the lines that begin in bytes start..end. `stream` stands at 0, and can seek unless start is 0."""
    position, pending = start, b""
    if start:
        stream.seek(start - 1)
        position, pending = _after_newline(stream, start - 1, end)
    while position < end:
        chunk = stream.read(BLOCK_BYTES)
        pending += chunk
        if not pending:
            return
        cut = pending.find(b"\n", end - position - 1) + 1 if len(pending) >= end - position else 0
        cut = cut or pending.rfind(b"\n", 0, end - position) + 1
        if not cut and not chunk:  # the file ends without a newline
            cut = len(pending)
        if cut:
            yield position, pending[:cut]
            position, pending = position + cut, pending[cut:]
        elif len(pending) > LONG_LINE_BYTES:
            line = LongLine(stream, pending)
            yield position, line
            for _ in line:  # what its reader left
                pass
            position, pending = position + line.length, line.rest


def _after_newline(stream: io.BufferedIOBase, position: int, end: int) -> tuple[int, bytes]:
    """Where the first line after `position` begins, and what was read of it; (end, b"") where it begins later than that."""
    while position < end and (chunk := stream.read(BLOCK_BYTES)):
        newline = chunk.find(b"\n")
        if newline >= 0:
            return position + newline + 1, chunk[newline + 1 :]
        position += len(chunk)
    return end, b""


def stream_json(chunks: Iterator[bytes], keys: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """(key, piece of its text) of one JSON object; (key, None) where a value begins, which voids what an earlier one of that name gave.

    Raises BadRecordError, possibly after pieces were given: invalid JSON or UTF-8, a key that is missing or no string.
    """
    skeleton = bytearray()  # the object with long strings left out, for a real parser to judge
    depth, before, key, buffer = 0, b"", "", b""
    in_string = wanted = False
    kept = string_start = 0
    for chunk in chunks:
        buffer += chunk
        position = 0
        while position < len(buffer):
            if not in_string:
                quote = buffer.find(b'"', position)
                outside = buffer[position : quote if quote >= 0 else len(buffer)]
                skeleton += outside
                depth += sum(1 if mark in b"{[" else -1 for mark in _NESTING.findall(outside))
                before = outside.rstrip()[-1:] or before
                position += len(outside) + (quote >= 0)
                if quote >= 0:
                    skeleton += b'"'
                    in_string, kept, string_start = True, 0, len(skeleton)
                    wanted = depth == 1 and before == b":" and key in keys
                    if wanted:
                        yield key, None
                continue
            position, piece, closed = _string_piece(buffer, position)
            text = parse_json(b'"%b"' % piece)
            if wanted:
                _check_text(key, text)
                yield key, text
            elif kept + len(piece) <= _MAX_OTHER_STRING:
                skeleton += piece
                kept += len(piece)
            if closed:
                if depth == 1 and before in b"{,":
                    key = parse_json(b'"%b"' % bytes(skeleton[string_start:]))
                skeleton += b'"'
                before, in_string = b'"', False
            else:
                break
        buffer = buffer[position:]
        if len(skeleton) > _MAX_SKELETON_BYTES:
            raise BadRecordError("more than 64 MB of JSON beside the text")
    if in_string:
        raise BadRecordError("broken JSON: unterminated string")
    check_record(parse_json(bytes(skeleton)), keys, may_be_empty=True)


def _string_piece(buffer: bytes, position: int) -> tuple[int, bytes, bool]:
    """(new position, complete characters and escapes from `position`, whether the string closed). Leaves what a later chunk completes."""
    stop = _STRING_UNITS.match(buffer, position).end()
    if stop < len(buffer) and buffer[stop : stop + 1] == b'"':
        return stop + 1, buffer[position:stop], True
    if stop < len(buffer) and len(buffer) - stop >= 6:
        raise BadRecordError("broken JSON: invalid escape")
    for back in range(1, min(4, stop - position + 1)):
        byte = buffer[stop - back]
        if byte >= 0xC0:
            stop -= back if back < (4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2) else 0
            break
        if byte < 0x80:
            break
    if _HIGH_SURROGATE_END.search(buffer, max(position, stop - 4096), stop):
        stop -= 6
    return stop, buffer[position:stop], False


def parse_json(line: bytes) -> object:
    """One JSON value. NaN, Infinity and lone surrogates, which Python's own writer produces, are let through as its reader does."""
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if not line.strip():
            raise BlankLineError from None
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        raise BadRecordError(describe_bad_json(line)) from None


def describe_bad_json(line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start}"
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"broken JSON: {error.msg} at character {error.pos}"
    except RecursionError:
        return "broken JSON: nested too deeply"
    except ValueError:
        return "broken JSON: a number of too many digits"
    return "broken JSON"


def check_record(record: object, keys: Collection[str], may_be_empty: bool = False) -> None:
    """Raises BadRecordError unless every key holds a text that UTF-8 can spell."""
    if not isinstance(record, dict):
        raise BadRecordError(f"not a JSON object but {type(record).__name__}")
    for key in keys:
        if key not in record:
            raise BadRecordError(f"missing key {key!r}")
        text = record[key]
        if not isinstance(text, str):
            raise BadRecordError(f"wrong type: {key!r} is {type(text).__name__}, not a string")
        if not text and not may_be_empty:
            raise BadRecordError(f"empty text in {key!r}")
        _check_text(key, text)


def _check_text(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecordError(f"lone surrogate in {key!r}") from None
