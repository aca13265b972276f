"""Preprocessing: documents in, Megatron's indexed datasets out, by worker processes that make shards and one parent that assembles them.

`tools/preprocess_data.py` is its command line. A run that was killed continues with the same call and ends with the same bytes.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.indexed_dataset import dtype_for_vocab_size
from megatron_llama3.data.preprocess_inputs import Piece, Source, Unit, expand_inputs, left_out, open_source, plan_units, unit_bytes_for
from megatron_llama3.data.preprocess_job import Assembler, JobFolder, Summary, count_lines
from megatron_llama3.data.preprocess_progress import Progress
from megatron_llama3.data.preprocess_tokenize import BulkTokenizer
from megatron_llama3.data.preprocess_worker import ShardMaker, ShardSpec, serve
from megatron_llama3.data.same_tokenizer import vocabulary_hash
from megatron_llama3.data.sidecar import read_sidecar
from megatron_llama3.tokenizer.llama3 import Tokenizer, load_tokenizer

_SPOOL_BYTES = 16 << 20
_RESUME = "the same command continues where this one stopped"


@dataclass(frozen=True)
class PreprocessOptions:
    """The flags of tools/preprocess_data.py, which explains them."""

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    input_format: str = "auto"
    append_eod: bool = False
    prepend_bod: bool = False
    parse_special_tokens: bool = False
    bad_lines: str = "skip"
    strict: bool = False
    workers: int = 1
    num_shards: int = 1
    shard_id: int = 0
    log_interval: int = 100_000

    @property
    def prefix(self) -> str:
        """Where the output goes: PREFIX, or one of its shards."""
        return self.output_prefix if self.num_shards == 1 else f"{self.output_prefix}_{self.shard_id:05d}_of_{self.num_shards:05d}"


def preprocess(options: PreprocessOptions) -> tuple[Summary, list[str]]:
    """Runs the job to its end; returns its totals and the prefixes of the datasets written. Raises UserError."""
    for line in left_out(options.input, options.input_format):
        if options.strict:
            raise UserError(f"{line} (--strict)")
        print(line, file=sys.stderr)
    sources = expand_inputs(options.input, options.input_format)
    _check(options, sources)
    tokenizer = load_tokenizer(options.tokenizer_model)
    description = _describe(options, sources, tokenizer)
    outputs = [f"{options.prefix}_{key}_document" for key in options.json_keys]
    with JobFolder(options.prefix) as folder:
        if (done := _already_done(outputs, description)) is None:
            try:
                done = _run_job(options, sources, tokenizer, description, folder)
            except OSError as error:
                raise UserError(f"cannot write {error.filename or options.prefix}: {error.strerror}; {_RESUME}") from error
            except UserError as error:
                if isinstance(error.__cause__, OSError):  # the dataset's writer, which does not know that this job can continue
                    raise UserError(f"{error}; {_RESUME}") from error
                raise
        folder.remove()
    return done, outputs


def _run_job(options: PreprocessOptions, sources: list[Source], tokenizer: Tokenizer, description: dict, folder: JobFolder) -> Summary:
    spec = _shard_spec(options, tokenizer, str(folder.path))
    unit_bytes = folder.open_job(description, unit_bytes_for(sources, options.workers, options.num_shards))
    planned = partial(plan_units, sources, unit_bytes, options.num_shards, options.shard_id)
    units = _spooled(folder, sources) if sources[0].path == "-" else list(planned())
    progress = Progress(sum(unit.size for unit in units) if isinstance(units, list) else None, options.log_interval)
    bulk = BulkTokenizer(tokenizer, options.parse_special_tokens, options.tokenizer_model)
    pool = WorkerPool(options.workers, partial(ShardMaker, spec, sources, bulk), folder)
    try:
        with Assembler(folder, options.prefix, spec, sources) as assembler, progress:
            _run(iter(units), pool, folder, assembler, progress, sources)
            assembler.finalize({"job": description, "summary": asdict(assembler.summary)})
    finally:
        pool.close()
    return assembler.summary


def _check(options: PreprocessOptions, sources: list[Source]) -> None:
    if not 0 <= options.shard_id < options.num_shards:
        raise UserError(f"--shard-id {options.shard_id}: must be 0 to {options.num_shards - 1} with --num-shards {options.num_shards}")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    if sources[0].path == "-" and options.num_shards > 1:
        raise UserError("--num-shards: standard input cannot be divided among machines; give files")
    if len(options.json_keys) > 1 and any(source.kind == "text" for source in sources):
        raise UserError(f"--json-keys {' '.join(options.json_keys)}: plain text has one text only")
    if len(set(options.json_keys)) < len(options.json_keys):
        raise UserError(f"--json-keys {' '.join(options.json_keys)}: a key is named twice")


def _describe(options: PreprocessOptions, sources: list[Source], tokenizer: Tokenizer) -> dict:
    """What decides the bytes of the output; kept beside it. Two runs are the same job where these are equal."""
    names = ("json_keys", "input_format", "append_eod", "prepend_bod", "parse_special_tokens", "bad_lines", "num_shards", "shard_id")
    flags = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    inputs = [[source.path, source.size, source.mtime_ns] for source in sources]
    return json.loads(json.dumps({"--input": inputs, "--tokenizer-model": vocabulary_hash(tokenizer), **flags}))


def _already_done(outputs: list[str], description: dict) -> Summary | None:
    """The totals of this very job, where its datasets are all there; from standard input one cannot know."""
    sidecars = [read_sidecar(output) for output in outputs if os.path.exists(f"{output}.idx") and os.path.exists(f"{output}.bin")]
    if description["--input"][0][0] == "-" or len(sidecars) < len(outputs):
        return None
    if any(sidecar is None or sidecar["metadata"].get("job") != description for sidecar in sidecars):
        return None
    return Summary(**sidecars[0]["metadata"]["summary"])


def _shard_spec(options: PreprocessOptions, tokenizer: Tokenizer, folder: str) -> ShardSpec:
    return ShardSpec(
        folder,
        options.json_keys,
        dtype_for_vocab_size(tokenizer.vocab_size).name,
        (tokenizer.bos_id,) if options.prepend_bod else (),
        (tokenizer.eos_id,) if options.append_eod else (),
        options.bad_lines == "fatal",
    )


def _spooled(folder: JobFolder, sources: list[Source]) -> Iterator[Unit]:
    """Standard input as units, each in a file of its own until its shard is made."""
    stream, offset, number, rest = open_source("-", ""), 0, 0, b""
    while True:
        path = folder.path / f"input-{number:06d}"
        size = crc = 0
        with open(path, "wb") as file:
            while True:
                chunk = rest or stream.read(_SPOOL_BYTES)
                cut = chunk.rfind(b"\n") + 1 if sources[0].kind == "jsonl" else 0
                part, rest = (chunk[:cut], chunk[cut:]) if cut else (chunk, b"")
                file.write(part)
                size, crc = size + len(part), crc32(part, crc)
                if cut or not chunk:
                    break
        if size:
            yield Unit((Piece(0, offset, offset + size, str(path)),), size, crc)
        offset, number = offset + size, number + 1
        if not chunk:
            path.unlink(missing_ok=not size)
            return


class WorkerPool:
    """Forked processes, each with a pipe. Two tasks at a time to each, so that none waits for the parent."""

    def __init__(self, count: int, maker_of: partial, folder: JobFolder):
        context = multiprocessing.get_context("fork")
        self._tasks: dict[Connection, list[tuple[int, Unit]]] = {}
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._child, args=(theirs, maker_of, folder, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._tasks[ours], self._processes[ours] = [], process

    def _child(self, connection: Connection, maker_of: partial, folder: JobFolder, parent: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        folder.release()
        for other in self._processes:
            other.close()
        serve(connection, maker_of, parent)

    @property
    def free(self) -> list[Connection]:
        """Workers that can take a task, idle ones first."""
        return sorted((worker for worker, tasks in self._tasks.items() if len(tasks) < 2), key=lambda worker: len(self._tasks[worker]))

    @property
    def busy(self) -> bool:
        return any(self._tasks.values())

    def submit(self, worker: Connection, number: int, unit: Unit) -> None:
        self._tasks[worker].append((number, unit))
        try:
            worker.send((number, unit))
        except OSError:
            raise self._death(worker) from None

    def messages(self, seconds: float) -> Iterator[tuple[int, Unit, tuple]]:
        """(number, unit, message) of what workers say. Raises UserError where one has died."""
        for worker in wait(list(self._tasks), seconds):
            try:
                message = worker.recv()
            except (EOFError, OSError):
                raise self._death(worker) from None
            number, unit = self._tasks[worker][0]
            if message[0] == "done":
                self._tasks[worker].pop(0)
            yield number, unit, message

    def _death(self, worker: Connection) -> UserError:
        process = self._processes[worker]
        process.join(5)
        code = process.exitcode
        cause = f"was killed by signal {-code} (out of memory?)" if code is not None and code < 0 else f"ended with status {code}"
        return UserError(f"worker process {process.pid} {cause}; {_RESUME}")

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()


def _run(
    units: Iterator[Unit], pool: WorkerPool, folder: JobFolder, assembler: Assembler, progress: Progress, sources: list[Source]
) -> None:
    """Hands out units, and assembles their shards in input order as they come."""
    tasks = enumerate(units)
    made: dict[int, Unit] = {}
    assembled = 0
    more = True
    while more or pool.busy or made:
        for worker in pool.free if more else ():
            for number, unit in tasks:
                if not folder.has_shard(number, unit):
                    pool.submit(worker, number, unit)
                    break
                made[number] = unit
                progress.skip(unit)
            else:
                more = False
                break
        for number, unit, message in pool.messages(0.2 if pool.busy else 0):
            if message[0] == "progress":
                progress.add(number, unit, *message[1:])
            elif message[0] == "done":
                made[number] = unit
                progress.finish(number, unit)
            elif message[0] == "bad":
                raise UserError(_bad_line(sources, *message[1:]))
            else:
                raise UserError(f"{message[1]}; {_RESUME}")
        while assembled in made:
            unit = made.pop(assembled)
            assembler.append(assembled, unit)
            for piece in unit.pieces:
                if piece.spool:
                    Path(piece.spool).unlink(missing_ok=True)
            assembled += 1


def _bad_line(sources: list[Source], source: int, byte: int, reason: str) -> str:
    found = sources[source]
    if found.kind == "parquet":
        return f"{found.path} row {byte}: {reason}; mend it, or skip such rows with --bad-lines skip"
    place = f" line {count_lines(found.path, byte) + 1}" if found.divisible else f" byte {byte} of its text"
    return f"{found.path}{place}: {reason}; mend it, or skip such lines with --bad-lines skip"
