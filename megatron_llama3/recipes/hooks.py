"""What happens between steps, as hooks for `training.loop.train`: noting what went wrong, rolling back, saving, evaluation."""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_llama3.checkpoint.native.checksums import DamagedCheckpointError
from megatron_llama3.checkpoint.native.folder import STATE_FILE, read_train_state
from megatron_llama3.checkpoint.native.manifest import damage
from megatron_llama3.checkpoint.patient_saves import PatientSaves
from megatron_llama3.checkpoint.start import Start
from megatron_llama3.checkpoint.store import CheckpointWriter, load_checkpoint
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.storage import patiently
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.parallel.groups import ParallelGroups, said_by_rank_0
from megatron_llama3.recipes.samples import Samples
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.events import EventLog
from megatron_llama3.training.garbage import ManualGarbageCollection
from megatron_llama3.training.loop import Hook
from megatron_llama3.training.metrics import MetricsLogger
from megatron_llama3.training.objectives import Objective
from megatron_llama3.training.profiling import Profile
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult
from megatron_llama3.training.stop import StopReasons
from megatron_llama3.training.straggler import StragglerReport
from megatron_llama3.training.watchdog import Watchdog
from megatron_llama3.training.whereabouts import SAVE


class Observers:
    """Who hears of what hooks do. Metrics and most events are rank 0's to write; the watchdog of each rank sees that it goes on."""

    def __init__(self, config: RunConfig, groups: ParallelGroups, state: TrainState, events: EventLog, watchdog: Watchdog):
        """Collective."""
        self.is_rank_0 = groups.rank == 0
        self.events = events
        self.logger = said_by_rank_0(groups, lambda: MetricsLogger(config, state), is_shared=False)
        self.watchdog = watchdog

    def record(self, event: str, state: TrainState, **fields) -> None:
        """Keeps an event of the run, once."""
        if self.is_rank_0:
            self.events.add(event, iteration=state.iteration, **fields, useful_seconds=state.useful_seconds)

    def close(self) -> None:
        """Before ranks leave the job, each in its own time."""
        if self.logger is not None:
            self.logger.close()
        self.events.close()
        self.watchdog.stop()

    def save_failed(self, state: TrainState, reason: str, attempt: int) -> None:
        self.record("save_failed", state, reason=reason, attempt=attempt)
        if self.logger is not None:
            self.logger.print_line(f"iteration {state.iteration} | {reason}; training goes on, it is tried again (failure {attempt})")

    def training_paused(self, seconds: float) -> None:
        """The run did something else than training for so long, and has come further."""
        self.watchdog.beat()
        if self.logger is not None:
            self.logger.training_paused(seconds)


def hooks_in_order(
    engine: Engine,
    objective: Objective,
    streams: tuple[TrainingStream, TrainingStream | None],
    config: RunConfig,
    observers: Observers,
    start: Start | None,
    stop: StopReasons,
) -> list[Hook]:
    """What runs after every step, first to last: what is noted of a step, before what may undo it, before what is saved, before evaluation.

    `streams` are those of training and, where there is one, of validation.
    """
    train_stream, valid_stream = streams
    saves = _saves(engine, config, observers, start, stop) if config.checkpoint.save is not None else None
    hooks = [noting_steps(observers, train_stream)]
    hooks += [observers.logger] if observers.logger is not None else []
    hooks += [Profile(config, engine.groups.rank)] if config.logging.profile else []
    hooks += [ManualGarbageCollection(config.training.manual_gc_interval)] if config.training.manual_gc else []
    hooks += [StragglerReport(config.logging, engine.groups, observers.events)] if config.logging.log_straggler else []
    hooks += [rolling_back(engine, train_stream, config, observers, saves, start)]
    hooks += [saving(saves, train_stream, config, observers)] if saves is not None else []
    hooks += [evaluation(engine, objective, valid_stream, config, observers)] if valid_stream is not None else []
    hooks += [Samples(engine, config, observers)] if config.logging.sample_interval is not None else []
    return hooks


def _saves(engine: Engine, config: RunConfig, observers: Observers, start: Start | None, stop: StopReasons) -> PatientSaves:
    writer = CheckpointWriter(config, engine, start and start.folder)
    minutes = config.training.storage_retry_minutes
    return PatientSaves(writer, minutes, lambda: stop.is_hurried(engine.groups.control), observers.save_failed)


def noting_steps(observers: Observers, stream: TrainingStream) -> Hook:
    """Tells the watchdog of each step, and keeps an event of each that was skipped, with the place in the data where it ended."""

    def hook(state: TrainState, result: StepResult, is_last: bool) -> None:
        observers.watchdog.beat(state.iteration)
        if result.skipped is not None:
            ends_at = [{key: row[key] for key in ("prefix", "epoch", "token_offset")} for row in stream.state_dict()["sources"]]
            found = {"reason": result.skipped, "loss": result.loss, "gradient_norm": result.gradient_norm}
            observers.record("skip", state, **found, in_a_row=state.skipped_in_a_row, data_ends_at=ends_at)

    return hook


def rolling_back(
    engine: Engine,
    stream: TrainingStream,
    config: RunConfig,
    observers: Observers,
    saves: PatientSaves | None,
    start: Start | None,
) -> Hook:
    """After --max-skips-in-a-row: weights, moments and schedule of the last checkpoint that no bad step preceded; the data moves on, so
    that what was read since is not read again. A checkpoint that did not help is not tried twice: the next time the run goes one further
    back, and when there is none left it ends."""

    def hook(state: TrainState, result: StepResult, is_last: bool) -> None:
        if state.skipped_in_a_row < config.training.max_skips_in_a_row:
            return
        if saves is not None:
            saves.wait(state)
        before, position = state.updates, stream.state_dict()
        target, restored = _roll_back(engine, stream, config, state, start)
        if restored is None:
            skipped = f"{state.skipped_in_a_row} steps were skipped in a row, the last because {result.skipped}"
            advice = "no checkpoint is left to go back to: start from an earlier one by --load, perhaps with a lower --lr"
            raise UserError(f"iteration {state.iteration}: {skipped}; {advice}")
        stream.load_state_dict(position)
        state.lost_updates, state.skipped_in_a_row = state.iteration - restored.updates, 0
        state.lost_samples = state.consumed_samples - restored.update_samples
        state.recent_losses, state.useful_seconds = restored.recent_losses, restored.useful_seconds
        state.rolled_back_to.append(restored.iteration)
        observers.record("rollback", state, to=restored.iteration, lost_updates=before - restored.updates)
        if observers.logger is not None:
            observers.logger.print_line(f"iteration {state.iteration} | weights rolled back to {target}; the data goes on from here")

    return hook


def _roll_back(
    engine: Engine, stream: TrainingStream, config: RunConfig, state: TrainState, start: Start | None
) -> tuple[Path | None, TrainState | None]:
    """Loads the newest checkpoint to go back to, past those that turn out to be damaged, and returns it and its state; None twice if there
    is none left (collective)."""
    plain = replace(config.checkpoint, finetune=False, no_load_optim=False, no_load_rng=False)
    damaged: list[Path] = []

    def look() -> Path | None:
        return said_by_rank_0(engine.groups, lambda: _rollback_target(config, state, start, damaged))

    while (target := patiently(look, config.training.storage_retry_minutes, engine.groups.rank == 0)) is not None:
        try:
            return target, load_checkpoint(target, replace(config, checkpoint=plain), engine, stream)
        except DamagedCheckpointError as error:
            if engine.groups.rank == 0:
                print(f"{target.name} is passed over: {error}", flush=True)
            damaged.append(target)
    return None, None


def _rollback_target(config: RunConfig, state: TrainState, start: Start | None, damaged: Sequence[Path] = ()) -> Path | None:
    """The newest whole checkpoint to go back to, of --save and the one that the run started from, that is not among the `damaged`; None if
    there is none left."""
    save = config.checkpoint.save
    folders = [path.parent for path in Path(save).glob(f"iter_*/{STATE_FILE}")] if save is not None else []
    if start is not None and not start.is_hf and not start.options.finetune:
        folders.append(start.folder)
    folders = [folder for folder in dict.fromkeys(folders) if folder not in damaged]
    whole = [folder for folder in folders if re.fullmatch(r"iter_\d+", folder.name) and damage(folder) is None]
    states = {folder: read_train_state(folder) for folder in whole}
    sound = [
        folder
        for folder, saved in states.items()
        if "data" in saved and not saved.get("skipped_in_a_row") and saved["iteration"] < state.iteration
        if saved["iteration"] not in state.rolled_back_to
    ]
    return max(sound, key=lambda folder: states[folder]["iteration"], default=None)


def saving(saves: PatientSaves, stream: TrainingStream, config: RunConfig, observers: Observers) -> Hook:
    """Every --save-interval steps and after the last, and again where a save failed; the run does not end before the last checkpoint is on
    disk."""

    def hook(state: TrainState, result: StepResult, is_last: bool) -> None:
        saves.check(state)
        interval = config.checkpoint.save_interval
        is_due = interval and state.iteration % interval == 0
        if not (is_last or is_due or saves.is_retry_due()):
            return
        started = time.monotonic()
        observers.watchdog.announce(SAVE)
        has_begun = saves.save_last(state, stream) if is_last else saves.save(state, stream)
        stalled = time.monotonic() - started
        observers.training_paused(stalled)
        if has_begun:
            observers.record("save", state, stall_seconds=stalled)
            if observers.logger is not None:
                observers.logger.saved(state, saves.writer.last_stall_seconds)

    return hook


def evaluation(engine: Engine, objective: Objective, stream: TrainingStream, config: RunConfig, observers: Observers) -> Hook:
    """Every --eval-interval steps and at --train-iters: the mean loss over the same --eval-iters global batches of the validation split,
    of the ramps' last size and length. A run that is told to stop early does not wait for it."""

    def hook(state: TrainState, result: StepResult, is_last: bool) -> None:
        is_due = state.iteration % config.training.eval_interval == 0 and not is_last
        if is_due or state.iteration >= config.training.train_iters:
            started = time.monotonic()
            loss = evaluate(engine, objective, stream, config, observers.watchdog.beat)
            seconds = time.monotonic() - started
            observers.training_paused(seconds)
            observers.record("evaluate", state, seconds=seconds)
            if observers.logger is not None:
                observers.logger.evaluated(state, loss)

    return hook


def evaluate(
    engine: Engine,
    objective: Objective,
    stream: TrainingStream,
    config: RunConfig,
    after_batch: Callable[[], None] = lambda: None,
) -> float:
    """The mean loss over the first --eval-iters global batches of `stream`. Collective."""
    stream.rewind()
    total, count = 0.0, 0
    for _ in range(config.training.eval_iters):
        at, sizes, t = engine.groups.at, engine.groups.topology, config.training
        batch = stream.next_batch(t.global_batch_size, config.data.seq_length, t.micro_batch_size, at.dp, sizes.dp)
        sums, counted = engine.evaluate(batch, objective)
        total, count = total + sums["loss"], count + counted
        after_batch()
    return total / (count or math.nan)
