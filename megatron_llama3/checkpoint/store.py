"""Training checkpoints: saved from any layout and engine, loaded into any other, whole or absent, written while training goes on.

    SAVE/latest_checkpointed_iteration.txt
    SAVE/iter_0000500/   torch.distributed.checkpoint files with global names and shapes, run_config.yaml, train_state.json

A save is written to `iter_0000500.partial`, synced, renamed, and then named in latest_checkpointed_iteration.txt.
"""

import base64
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megatron_llama3.checkpoint.native import CONFIG_FILE, LATEST_FILE, STATE_FILE, resolve_native
from megatron_llama3.checkpoint.native_metadata import SafeFileSystemReader
from megatron_llama3.checkpoint.publish import sync
from megatron_llama3.config.command_line import resolved_yaml
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.state import TrainState


class CheckpointWriter:
    """Saves of one run, one at a time. Every rank has one and calls it at the same iterations."""

    def __init__(self, config: RunConfig, engine: Engine):
        self.config, self.engine = config, engine
        self.folder = Path(config.checkpoint.save)
        self.group = engine.groups.saving
        if "gloo" not in dist.get_backend_config(self.group) and "fake" not in dist.get_backend_config(self.group):
            raise RuntimeError("saving needs a process group with a CPU backend")
        self.background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        self.last_stall_seconds = 0.0

    def save(self, state: TrainState, stream: TrainingStream) -> None:
        """Copies the run's state to host memory, which is the time training stops for, and writes it in the background."""
        self.wait()
        started = time.monotonic()
        partial = self.folder / f"iter_{state.iteration:07d}.partial"
        if self.engine.groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / CONFIG_FILE).write_text(resolved_yaml(self.config))
            (partial / STATE_FILE).write_text(json.dumps(_train_state(state, stream, self.config), indent=1))
        dist.barrier(self.group)
        written = dcp.async_save(
            self._tensors(),
            storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
            process_group=self.group,
            async_stager=DefaultStager(StagingOptions(False, False, False, False)),
        )
        self.pending = self.background.submit(self._finish, written, partial)
        self.last_stall_seconds = time.monotonic() - started
        if self.config.checkpoint.no_async_save:
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk on every rank. Raises UserError where it could not be written."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except Exception as error:
            raise UserError(f"--save {self.folder}: checkpoint could not be written: {_first_line(error)}") from error
        dist.barrier(self.group)

    def _finish(self, written: Future, partial: Path) -> None:
        written.result()  # on rank 0: every rank has written and synced its part
        if self.engine.groups.rank == 0:
            _publish(partial)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = self.engine.state_tensors()
        if self.engine.holds_second_tied_copy:
            tensors = {key: t for key, t in tensors.items() if not key.endswith(".tok_embeddings.weight")}
        return tensors


def find_checkpoint(config: RunConfig) -> Path | None:
    """The folder to start from, or None to start afresh: no --load, or --load equal to an empty --save. Raises UserError."""
    load, save = config.checkpoint.load, config.checkpoint.save
    if load is None:
        return None
    is_empty = not (Path(load) / LATEST_FILE).exists() and not (Path(load) / ".metadata").exists()
    if is_empty and save is not None and Path(load).resolve() == Path(save).resolve():
        return None
    return resolve_native(load)


def load_checkpoint(folder: Path, config: RunConfig, engine: Engine, stream: TrainingStream) -> TrainState:
    """Restores weights, optimizer, schedule, data position and random state; with --finetune weights only. Collective."""
    options = config.checkpoint
    saved = _read_train_state(folder)
    _check_tokenizer(saved, config, folder)
    if "data" not in saved and not options.finetune:
        raise UserError(f"--load {folder}: holds weights alone, no training run to go on with: add --finetune to start from them")
    with_optimizer = not (options.finetune or options.no_load_optim)
    tensors = engine.state_tensors(with_optimizer)
    try:
        dcp.load(tensors, storage_reader=SafeFileSystemReader(folder), process_group=engine.groups.saving)
    except dcp.CheckpointException as error:
        reasons = [_first_line(failure[0]) for failure in error.failures.values()]
        raise UserError(f"--load {folder}: {reasons[0] if reasons else error}") from error
    engine.state_loaded(saved["iteration"], with_optimizer)
    if options.finetune:
        return TrainState()
    stream.load_state_dict(saved["data"])
    if not options.no_load_rng:
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(saved["rng"])), dtype=torch.uint8))
    return TrainState(saved["iteration"], saved["consumed_samples"], saved["consumed_tokens"])


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


def _check_tokenizer(saved: dict, config: RunConfig, folder: Path) -> None:
    theirs, ours = saved.get("tokenizer"), _tokenizer_digest(config)
    if theirs is not None and ours is not None and theirs != ours:
        raise UserError(f"--tokenizer-model {config.data.tokenizer_model} is another one than {folder} was trained with: it must match")


def _read_train_state(folder: Path) -> dict:
    path = folder / STATE_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _publish(partial: Path) -> None:
    """Gives a whole save its name, then makes it the latest."""
    for name in (CONFIG_FILE, STATE_FILE):
        sync(partial / name)
    sync(partial)
    final = partial.with_suffix("")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)
    latest = final.parent / LATEST_FILE
    aside = latest.with_suffix(".partial")
    aside.write_text(str(int(final.name.removeprefix("iter_"))))
    sync(aside)
    os.replace(aside, latest)
    sync(latest.parent)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
