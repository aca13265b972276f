"""What there is to read: `--input` expanded to sources, and sources cut into units of work that do not depend on the number of workers."""

import glob
import gzip
import io
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llama3.config.errors import UserError

_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".zst")
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 20, 64 << 20


@dataclass(frozen=True)
class Source:
    """One input file. kind: "jsonl", "text" or "parquet"; compression: "", ".gz" or ".zst"; path "-" is standard input."""

    path: str
    kind: str
    compression: str
    size: int
    mtime_ns: int

    @property
    def divisible(self) -> bool:
        """Whether any byte range can be read without reading what comes before it."""
        return self.kind == "jsonl" and not self.compression and self.path != "-"


@dataclass(frozen=True)
class Piece:
    """Lines that begin in bytes start..end of a source (rows of a Parquet file). `spool`: a file that holds exactly these bytes."""

    source: int
    start: int
    end: int
    spool: str | None = None


def expand_inputs(patterns: Sequence[str], input_format: str = "auto") -> list[Source]:
    """Files, folders, globs and "-" in the order given, folders and globs sorted; a pipe (a shell's `<(...)`) is read as standard input.

    Raises UserError for what is not there, not known, or there twice."""
    sources: list[Source] = []
    for pattern in patterns:
        if pattern == "-" or _is_pipe(pattern):
            if pattern != "-":
                os.dup2(os.open(pattern, os.O_RDONLY), 0)
            sources.append(Source("-", "jsonl" if input_format == "auto" else input_format, "", 0, 0))
            continue
        if os.path.isdir(pattern):
            found = sorted(str(path) for path in Path(pattern).rglob("*") if path.is_file() and _wanted(path, input_format))
        else:
            found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not found:
            raise UserError(f"--input {pattern}: nothing there of .jsonl, .json, .txt, .parquet (also .gz, .zst)")
        sources.extend(_source(path, input_format) for path in found)
    if sum(source.path == "-" for source in sources) and len(sources) > 1:
        raise UserError("--input -: standard input, or a pipe, cannot be mixed with files or another one")
    seen: dict[str, str] = {}
    for path in (source.path for source in sources if source.path != "-"):
        if other := seen.get(os.path.realpath(path)):
            raise UserError(f"--input {path}: the same file as {other}, which is there already; name it once")
        seen[os.path.realpath(path)] = path
    return sources


def left_out(patterns: Sequence[str], input_format: str = "auto") -> list[str]:
    """A line for each folder of the input in which there is something that is not read: how much of it, by extension."""
    lines = []
    for folder in filter(os.path.isdir, patterns):
        others = [path for path in Path(folder).rglob("*") if not path.is_dir() and not (path.is_file() and _wanted(path, input_format))]
        kinds = Counter(_what(path) for path in others)
        if kinds:
            named = ", ".join(f"{count:,} {what}" for what, count in kinds.most_common())
            lines.append(f"--input {folder}: left out {len(others):,} of its files: {named}")
    return lines


def _what(path: Path) -> str:
    if not path.exists():
        return "broken link"
    if path.name.startswith("."):
        return "hidden"
    return "".join(path.suffixes[-2:]) or "without extension"


def _is_pipe(path: str) -> bool:
    return os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)


def _wanted(path: Path, input_format: str) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and (input_format != "auto" or _kind_and_compression(path)[0] is not None)


def _kind_and_compression(path: str | Path) -> tuple[str | None, str]:
    stem, extension = os.path.splitext(str(path).lower())
    if extension in _COMPRESSIONS:
        return _KINDS.get(os.path.splitext(stem)[1]), extension
    return _KINDS.get(extension), ""


def _source(path: str, input_format: str) -> Source:
    kind, compression = _kind_and_compression(path)
    kind = kind if input_format == "auto" else input_format
    if kind is None:
        raise UserError(f"--input {path}: unknown extension; say what it is with --input-format jsonl, text or parquet")
    if kind == "parquet" and compression:
        raise UserError(f"--input {path}: a Parquet file is compressed inside; decompress the {compression} around it")
    status = os.stat(path)
    return Source(path, kind, compression, status.st_size, status.st_mtime_ns)


def open_source(path: str, compression: str) -> io.BufferedIOBase:
    """The bytes of a file, decompressed. Damaged files raise OSError, EOFError or zstandard.ZstdError on reading."""
    if path == "-":
        return sys.stdin.buffer
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        return io.BufferedReader(ZstandardReader(path), 1 << 20)
    return open(path, "rb")


class ZstandardReader(io.RawIOBase):
    """A .zst file of any number of frames. zstandard's own reader ends in silence where the file is cut off; this one raises EOFError."""

    def __init__(self, path: str):
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115
        self._context = zstandard.ZstdDecompressor()
        self._frame = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._file.read(16 << 10)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._context.decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        taken = self._output[: len(buffer)]
        buffer[: len(taken)] = taken
        self._output = self._output[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def decompression_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged compressed file raises."""
    import zlib

    zstandard = sys.modules.get("zstandard")
    return (EOFError, zlib.error, gzip.BadGzipFile, *((zstandard.ZstdError,) if zstandard else ()))


def unit_bytes_for(sources: Sequence[Source], workers: int, num_shards: int) -> int:
    """Small enough that every worker has several units, within bounds. Shards must agree on it, whatever workers each of them has."""
    share = sum(source.size for source in sources) // (8 * workers if num_shards == 1 else 64 * num_shards)
    return min(max(share, MIN_UNIT_BYTES), MAX_UNIT_BYTES)


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time, and becomes one shard. size: the bytes of input that it stands for."""

    pieces: tuple[Piece, ...]
    size: int
    input_crc: int | None = None  # of a spooled unit, to know it again


def plan_units(sources: Sequence[Source], unit_bytes: int, num_shards: int = 1, shard_id: int = 0) -> Iterator[Unit]:
    """Units in input order, each about `unit_bytes` of input; small files share one. With shards, those whose middle lies in this shard."""
    total = max(sum(source.size for source in sources), 1)
    begin = 0
    for unit in _group(_pieces(sources, unit_bytes), unit_bytes):
        shard = min((begin + unit.size // 2) * num_shards // total, num_shards - 1)
        begin += unit.size
        if shard == shard_id:
            yield unit


def _group(pieces: Iterator[tuple[Piece, int]], unit_bytes: int) -> Iterator[Unit]:
    held: list[Piece] = []
    filled = 0
    for piece, size in pieces:
        if held and (filled + size > unit_bytes or len(held) == 4096):
            yield Unit(tuple(held), filled)
            held, filled = [], 0
        held.append(piece)
        filled += size
    if held:
        yield Unit(tuple(held), filled)


def _pieces(sources: Sequence[Source], unit_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Each piece with the bytes of input that it stands for."""
    for number, source in enumerate(sources):
        if source.divisible:
            for start in range(0, source.size, unit_bytes):
                end = min(start + unit_bytes, source.size)
                yield Piece(number, start, end), end - start
        elif source.kind == "parquet":
            for first, last, size in _row_groups(source):
                yield Piece(number, first, last), size
        else:
            yield Piece(number, 0, sys.maxsize), source.size


def _row_groups(source: Source) -> Iterator[tuple[int, int, int]]:
    """(first row, one past the last, share of the file's bytes) of each row group."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(source.path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"--input {source.path}: not a readable Parquet file ({error})") from None
    row = 0
    for i in range(metadata.num_row_groups):
        rows = metadata.row_group(i).num_rows
        yield row, row + rows, source.size * rows // max(metadata.num_rows, 1)
        row += rows
