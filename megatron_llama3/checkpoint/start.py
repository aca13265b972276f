"""What a run starts from: its own last whole checkpoint (--auto-resume), another one (--load), a Hugging Face folder (--load-hf), or
nothing."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_llama3.checkpoint.compatibility import check_compatible
from megatron_llama3.checkpoint.huggingface import open_hf
from megatron_llama3.checkpoint.native.checksums import DamagedCheckpointError
from megatron_llama3.checkpoint.native.folder import CONFIG_FILE, LATEST_FILE, latest_iteration, resolve_native
from megatron_llama3.checkpoint.native.manifest import damage
from megatron_llama3.checkpoint.store import load_checkpoint, load_hf_weights
from megatron_llama3.config.command_line import load_run_config
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import CheckpointConfig, RunConfig
from megatron_llama3.config.storage import is_there, patiently
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.parallel.groups import ParallelGroups, said_by_rank_0
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.events import EVENTS_FILE, METRICS_FILE
from megatron_llama3.training.state import TrainState

# What a Hugging Face folder says and training may say otherwise: no number of the trained model depends on it.
_FREE_MODEL_FIELDS = ("init_method_std", "max_position_embeddings", "kv_channels")  # head_dim is compared instead


@dataclass(frozen=True)
class Start:
    """A folder and how to take it. `options` are the run's, without --finetune and the like where it goes on from its own checkpoint."""

    folder: Path
    options: CheckpointConfig
    is_hf: bool = False


def find_start(config: RunConfig, groups: ParallelGroups, damaged: Sequence[Path] = ()) -> Start | None:
    """Rank 0 looks and every rank gets its choice (collective), so that all start from the same place and thousands of ranks do not each
    look at every file. Raises UserError on all ranks: nothing there, damaged, or made by a run that does not fit this one; StorageError
    where the file system failed for --storage-retry-minutes."""
    minutes = config.training.storage_retry_minutes
    return patiently(lambda: said_by_rank_0(groups, lambda: _choose(config, damaged)), minutes, groups.rank == 0)


def load_start(start: Start | None, config: RunConfig, engine: Engine, stream: TrainingStream) -> tuple[Start | None, TrainState]:
    """Restores what `find_start` found, and returns what was taken (collective). Where its tensors turn out to be damaged while they
    are read, --auto-resume goes back to the last whole checkpoint before it; otherwise DamagedCheckpointError is raised."""
    damaged: list[Path] = []
    while start is not None and not start.is_hf:
        try:
            return start, load_checkpoint(start.folder, replace(config, checkpoint=start.options), engine, stream)
        except DamagedCheckpointError as error:
            if not config.checkpoint.auto_resume or start.folder.parent != Path(config.checkpoint.save):
                raise
            if engine.groups.rank == 0:
                print(f"{start.folder.name} is passed over: {error}", flush=True)
            damaged.append(start.folder)
            start = find_start(config, engine.groups, damaged)
    if start is not None:
        patiently(lambda: load_hf_weights(start.folder, engine), config.training.storage_retry_minutes, engine.groups.rank == 0)
    return start, TrainState()


def latest_whole_checkpoint(config: RunConfig, damaged: Sequence[Path] = ()) -> Start | None:
    """The last whole checkpoint of this run's --save that is not among the `damaged`, taken with all that is in it; None where nothing was
    saved yet.

    Each damaged one that is passed over is a printed line. Raises UserError if none of several is whole.
    """
    candidates = _saved(Path(config.checkpoint.save))
    for folder in (folder for folder in candidates if folder not in damaged):
        reason = damage(folder)
        if reason is None:
            return Start(folder, replace(config.checkpoint, finetune=False, no_load_optim=False, no_load_rng=False))
        print(f"{folder.name} is passed over: {reason}", flush=True)
    if candidates:
        raise UserError(f"--save {config.checkpoint.save}: no checkpoint in it is whole; repair one, or empty the folder to start afresh")
    return None


def _choose(config: RunConfig, damaged: Sequence[Path] = ()) -> Start | None:
    options = config.checkpoint
    start = latest_whole_checkpoint(config, damaged) if options.auto_resume else None
    if start is None and options.load is not None:
        start = _other_start(options)
    if start is not None:
        path = start.folder / CONFIG_FILE
        check_compatible(load_run_config(str(path)), replace(config, checkpoint=start.options), str(path))
    elif options.load_hf is not None:
        start = Start(Path(options.load_hf), options, is_hf=True)
        _check_model(open_hf(start.folder), config, start.folder)
    if options.save is not None and not options.auto_resume:
        _check_save(Path(options.save), options.overwrite_save, start)
    return start


def _check_save(save: Path, overwrite: bool, start: Start | None) -> None:
    """Raises UserError if `save` holds checkpoints that this run does not go on from, and would overwrite one by one; with
    --overwrite-save they are deleted, and the run's metrics and events with them."""
    before = None if start is None or start.is_hf or start.options.finetune else start.folder.resolve()
    saved = [folder for folder in _saved(save) if folder.exists()]
    if not saved or (before is not None and before == saved[0].resolve()):
        return
    if not overwrite:
        raise UserError(
            f"--save {save} holds {len(saved)} checkpoint{'s' * (len(saved) > 1)}, the last {saved[0].name}, which this run does not go on "
            "from: add --auto-resume to go on, name another folder, or add --overwrite-save to delete what is there"
        )
    if before is not None and before.parent == save.resolve():
        saved = [folder for folder in saved if _age(folder.name) < _age(before.name)]
    for folder in [*saved, save / LATEST_FILE, *(save / name for name in (METRICS_FILE, EVENTS_FILE) if before is None)]:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)


def _other_start(options: CheckpointConfig) -> Start | None:
    """What --load names; None where it is the empty --save."""
    load = Path(options.load)
    is_empty = not is_there(load / LATEST_FILE) and not is_there(load / ".metadata")
    if is_empty and options.save is not None and load.resolve() == Path(options.save).resolve():
        return None
    folder = resolve_native(load)
    reason = damage(folder)
    if reason is not None:
        raise UserError(f"--load {options.load}: {reason}")
    return Start(folder, options)


def _saved(save: Path) -> list[Path]:
    """Checkpoint folders in the order in which they are tried: the one named as latest, then the others, newest first.

    A save of a step that had been saved before moves the old folder to NAME.replaced for a moment.
    """
    names = os.listdir(save) if is_there(save) else []
    found = sorted((name for name in names if re.fullmatch(r"iter_\d{7,}(\.replaced)?", name)), key=_age)
    latest = latest_iteration(save) if LATEST_FILE in names else None
    named = None if latest is None else f"iter_{latest:07d}"
    ordered = [name for name in (named,) if name] + [name for name in found if name != named]
    return [save / name for name in ordered]


def _age(name: str) -> tuple[int, bool]:
    """Newest first, the folder itself before the one it replaced."""
    return -int(name.removeprefix("iter_").removesuffix(".replaced")), name.endswith(".replaced")


def _check_model(source, config: RunConfig, folder: Path) -> None:
    """Raises UserError with a line for each model flag that says something else than `config.json`."""
    names = [f.name for f in fields(config.model) if f.name not in _FREE_MODEL_FIELDS]
    if not (config.model.use_rope_scaling or source.model.use_rope_scaling):
        names = [name for name in names if not name.startswith("rope_scaling_")]
    found = []
    for name in [*names, "head_dim"]:
        ours, theirs = getattr(config.model, name), getattr(source.model, name)
        if ours != theirs:
            flag = "--kv-channels" if name == "head_dim" else "--" + name.replace("_", "-")
            found.append(f"{flag} is {ours} here and {theirs} in {folder / 'config.json'}: it must match")
    if found:
        raise UserError("\n".join(found))
