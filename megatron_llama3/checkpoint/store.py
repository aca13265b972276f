"""Training checkpoints: saved from any layout and engine, loaded into any other, whole or absent, written while training goes on.

    SAVE/latest_checkpointed_iteration.txt
    SAVE/iter_0000500/   torch.distributed.checkpoint files with global names and shapes, run_config.yaml, train_state.json, manifest.json

A save is written to `iter_0000500.partial`, synced, summed up in its manifest, renamed, and then named in
latest_checkpointed_iteration.txt. Older ones are deleted after that (checkpoint/native/retention.py).
"""

import base64
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megatron_llama3.checkpoint.files.publish import sync
from megatron_llama3.checkpoint.huggingface import open_hf
from megatron_llama3.checkpoint.native.checked_loading import CheckedReader, CoveringPlanner
from megatron_llama3.checkpoint.native.checksums import DamagedCheckpointError
from megatron_llama3.checkpoint.native.folder import CONFIG_FILE, LATEST_FILE, STATE_FILE, WITHOUT_DATA, read_train_state
from megatron_llama3.checkpoint.native.manifest import MANIFEST_FILE, summarize, write_manifest
from megatron_llama3.checkpoint.native.metadata import SafeFileSystemReader
from megatron_llama3.checkpoint.native.retention import PARTIAL, REPLACED, delete_older, remove_leftovers
from megatron_llama3.checkpoint.native.threaded_writer import ThreadedWriter, files_of_rank, threads_for
from megatron_llama3.checkpoint.weight_reader import WeightReader
from megatron_llama3.config.command_line import resolved_yaml
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import CheckpointConfig, RunConfig
from megatron_llama3.config.storage import StorageError, is_passing, patiently
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.parallel.groups import agreed, said_by_rank_0
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.state import TrainState

HIDDEN_WRITE_ERROR = "unexpected pos"
"""Said by torch's zip writer where a write failed, whose own error it hides."""


class CheckpointWriter:
    """Saves of one run, one at a time. Every rank has one and calls it at the same iterations."""

    def __init__(self, config: RunConfig, engine: Engine, loaded_from: Path | None = None):
        """`loaded_from` is never deleted by --keep-last and --keep-every."""
        self.config, self.engine = config, engine
        self.folder = Path(config.checkpoint.save)
        self.group = engine.groups.saving
        if "gloo" not in dist.get_backend_config(self.group) and "fake" not in dist.get_backend_config(self.group):
            raise RuntimeError("saving needs a process group with a CPU backend")
        self.background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        self.pinned: DefaultStager | None = None
        self.protected = loaded_from and Path(str(loaded_from).removesuffix(REPLACED)).resolve()
        self.whole: set[Path] = set()
        """Checkpoints of the folder that were found whole once."""
        self.last_stall_seconds = 0.0
        """How long training stood still for the last save: for the one before it to end, if it had not, and for the copy."""
        if engine.groups.rank == 0:
            with suppress(OSError):  # the first save clears up again, and says what is wrong
                remove_leftovers(self.folder)

    def save(self, state: TrainState, stream: TrainingStream) -> None:
        """Copies the run's state to host memory, which is the time training stops for, and writes it in the background.

        Raises StorageError on every rank where this save cannot be begun, or the last one could not be written; the next one may be.
        """
        started = time.monotonic()
        self.wait()
        partial = self.folder / f"iter_{state.iteration:07d}{PARTIAL}"
        said_by_rank_0(self.engine.groups, lambda: self._begin(partial, _train_state(state, stream, self.config)))
        tensors = self._tensors()
        storage = ThreadedWriter(partial, threads_for(tensors))
        written = dcp.async_save(
            tensors,
            storage_writer=storage,
            process_group=self.group,
            async_stager=self._stager(tensors),
        )
        self.pending = self.background.submit(self._finish, written, partial, storage.starts)
        if self.config.checkpoint.no_async_save:
            self.wait()
        self.last_stall_seconds = time.monotonic() - started

    def _stager(self, tensors: dict[str, torch.Tensor]) -> DefaultStager:
        """What copies a save to host memory. From a GPU into pinned buffers that are made once and kept for all saves; the last save is on
        disk when they are written again. On a CPU into memory that is freed after the save."""
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return DefaultStager(StagingOptions(False, False, False, False))
        if self.pinned is None:
            self.pinned = DefaultStager(StagingOptions(use_shared_memory=False, use_async_staging=False))
        return self.pinned

    def _begin(self, partial: Path, state: dict) -> None:
        """On rank 0: the folder, with all but tensors."""
        try:
            remove_leftovers(self.folder)
            partial.mkdir(parents=True)
            (partial / CONFIG_FILE).write_text(resolved_yaml(self.config))
            (partial / STATE_FILE).write_text(json.dumps(state, indent=1))
        except OSError as error:
            self._clear_up()
            raise StorageError(f"--save {self.folder}: checkpoint could not be written: {_first_line(error)}") from error

    def check(self) -> None:
        """Between steps, while a save is under way: raises on every rank, as `wait` does, as soon as it has failed on one (collective)."""
        if self.pending is None:
            return
        is_done = self.pending.done()
        has_failed = is_done and self.pending.exception() is not None
        state = torch.tensor([int(has_failed), int(not is_done)])
        dist.all_reduce(state, dist.ReduceOp.MAX, group=self.engine.groups.control)  # the background thread has the group of saves
        any_failed, any_under_way = state.tolist()
        if any_failed or not any_under_way:
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk on every rank. Where it could not be written, raises StorageError on all of them, or UserError if
        that was no fault of the file system."""
        if self.pending is None:
            return
        (pending, self.pending), error = (self.pending, None), None
        try:
            pending.result()
        except (Exception, dcp.CheckpointException) as failure:  # torch's own is a BaseException
            error = failure
        failure = torch.tensor(0 if error is None else 1 if _is_of_storage(error) else 2)
        dist.all_reduce(failure, dist.ReduceOp.MAX, group=self.group)
        if failure:
            if self.engine.groups.rank == 0:
                self._clear_up()
            reason = _first_line(error) if error else "another rank says why"
            kind = StorageError if failure == 1 else UserError
            raise kind(f"--save {self.folder}: checkpoint could not be written: {reason}") from error

    def _clear_up(self) -> None:
        with suppress(OSError):  # the next save does it again
            remove_leftovers(self.folder)

    def _finish(self, written: Future, partial: Path, starts: dict[str, list[int]]) -> None:
        """In the background, on every rank: sums up what it wrote; rank 0 publishes the whole."""
        written.result()  # every rank has written and synced its part
        files = self._summaries(partial, starts)
        if self.engine.groups.rank != 0:
            return
        write_manifest(partial, files)
        final = _publish(partial)
        try:
            delete_older(final, self.config.checkpoint, self.protected, self.whole)
        except (OSError, UserError) as error:
            print(f"--keep-last/--keep-every: an older checkpoint could not be deleted: {error}", flush=True)

    def _summaries(self, partial: Path, starts: dict[str, list[int]]) -> dict[str, dict]:
        """The manifest's entries of all ranks' files, on rank 0 (collective). `starts`: where the tensors of this rank's begin."""
        rank = self.engine.groups.rank
        try:
            own = files_of_rank(partial, rank)  # none where other ranks write all of it
            mine = {path.name: summarize(path, starts[path.name]) for path in own}
        except OSError as error:
            mine = error
        everyones = [None] * dist.get_world_size(self.group) if rank == 0 else None
        dist.gather_object(mine, everyones, dst=0, group=self.group)
        for entries in everyones or [mine]:
            if isinstance(entries, OSError):
                raise entries
        return {name: entry for entries in everyones or () for name, entry in entries.items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = self.engine.state_tensors()
        copies = tuple(f".{name}" for name, _ in self.engine.named_weights() if self.engine.is_second_copy(name))
        return {key: t for key, t in tensors.items() if not key.endswith(copies)}


def load_checkpoint(folder: Path, config: RunConfig, engine: Engine, stream: TrainingStream) -> TrainState:
    """Restores weights, optimizer, schedule, data position and random state; with --finetune weights only. Collective.

    Raises UserError, of them DamagedCheckpointError on all ranks where one has read bytes that are not those that were saved; the engine's
    tensors are then of no use until others are loaded, and nothing else has changed. StorageError where the file system failed for
    --storage-retry-minutes.
    """
    minutes = config.training.storage_retry_minutes
    return patiently(lambda: _load_checkpoint(folder, config, engine, stream), minutes, engine.groups.rank == 0)


def _load_checkpoint(folder: Path, config: RunConfig, engine: Engine, stream: TrainingStream) -> TrainState:
    options = config.checkpoint
    saved = agreed(engine.groups, lambda: _read_state(folder, config))
    if "data" not in saved and not options.finetune:
        _check_data_may_begin(saved, options, folder)
    with_optimizer = not (options.finetune or options.no_load_optim)
    state = TrainState.from_saved(saved)
    reader = agreed(engine.groups, lambda: _reader(folder, options.no_load_checksums))
    _load_tensors(engine, reader, folder, state.updates, with_optimizer)
    if options.finetune:
        return TrainState()
    if "data" not in saved:
        return state
    try:
        stream.load_state_dict(saved["data"])
        if not options.no_load_rng:
            torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(saved["rng"])), dtype=torch.uint8))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # a part missing, or of another form
        raise UserError(f"{folder / STATE_FILE}: damaged: its data position or random state cannot be restored ({error!r})") from None
    return state


def _reader(folder: Path, no_checksums: bool) -> SafeFileSystemReader:
    reader = SafeFileSystemReader(folder) if no_checksums else CheckedReader(folder)
    reader.read_metadata()
    return reader


def _check_data_may_begin(saved: dict, options: CheckpointConfig, folder: Path) -> None:
    if not saved.get(WITHOUT_DATA):
        raise UserError(f"--load {folder}: holds weights alone, no training run to go on with: add --finetune to start from them")
    if not options.override_data:
        raise UserError(f"--load {folder}: was converted, and has no place in the data: add --override-data to begin the data at its start")


def load_hf_weights(folder: Path, engine: Engine) -> None:
    """The weights of a Hugging Face folder, in whatever dtype they are, straight into the engine (collective)."""
    reader = agreed(engine.groups, lambda: WeightReader(open_hf(folder)))
    _load_tensors(engine, reader, folder, 0, with_optimizer=False)


def _load_tensors(engine: Engine, reader: dcp.StorageReader, folder: Path, step: int, with_optimizer: bool) -> None:
    tensors = engine.state_tensors(with_optimizer)
    try:
        dcp.load(tensors, storage_reader=reader, planner=CoveringPlanner(folder), process_group=engine.groups.saving)
    except dcp.CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        damaged = [failure for failure in failures if isinstance(failure, DamagedCheckpointError)]
        if damaged:
            raise damaged[0] from error
        kind = StorageError if any(map(is_passing, failures)) else UserError
        raise kind(f"{folder}: {_first_line(failures[0]) if failures else error}") from error
    engine.state_loaded(step, with_optimizer)


def _train_state(state: TrainState, stream: TrainingStream, config: RunConfig) -> dict:
    """`rng` is rank 0's: nothing in pretraining draws random numbers after the initial weights."""
    rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    return {**asdict(state), "data": stream.state_dict(), "rng": rng, "tokenizer": _tokenizer_digest(config)}


def _tokenizer_digest(config: RunConfig) -> str | None:
    """Names the content of the run's tokenizer, wherever it lies."""
    if config.data.tokenizer_model is None:
        return None
    path = Path(config.data.tokenizer_model)
    files = [path] if path.is_file() else [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
    return hashlib.sha256(files[0].read_bytes()).hexdigest() if files else None


def _read_state(folder: Path, config: RunConfig) -> dict:
    """The train state, for a run with the tokenizer that it was saved with. Raises UserError."""
    saved = read_train_state(folder)
    _check_tokenizer(saved, config, folder)
    return saved


def _check_tokenizer(saved: dict, config: RunConfig, folder: Path) -> None:
    theirs, ours = saved.get("tokenizer"), _tokenizer_digest(config)
    if theirs is not None and ours is not None and theirs != ours:
        raise UserError(f"--tokenizer-model {config.data.tokenizer_model} is another one than {folder} was trained with: it must match")


def _publish(partial: Path) -> Path:
    """Gives a whole save its name, then makes it the latest."""
    for name in (CONFIG_FILE, STATE_FILE, MANIFEST_FILE):
        sync(partial / name)
    sync(partial)
    final = partial.with_suffix("")
    replaced = final.with_suffix(REPLACED)
    if final.exists():  # the step was saved before; its folder is there under one of two names until the new one is
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    latest = final.parent / LATEST_FILE
    aside = latest.with_suffix(".partial")
    aside.write_text(str(int(final.name.removeprefix("iter_"))))
    sync(aside)
    os.replace(aside, latest)
    sync(latest.parent)
    return final


def _is_of_storage(error: BaseException) -> bool:
    """Whether a file system failed, not the program: what worked in earlier saves may work again."""
    causes = [failure for failure, _ in error.failures.values()] if isinstance(error, dcp.CheckpointException) else [error]
    return any(isinstance(cause, (OSError, StorageError)) or HIDDEN_WRITE_ERROR in str(cause) for cause in causes)


def _first_line(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if HIDDEN_WRITE_ERROR in str(error):
        return "a file could not be written to its end: no space left, or a limit on the size of files"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
