"""What happens between steps, as hooks for `training.loop.train`: evaluation and saving."""

import time

from megatron_llama3.checkpoint.store import CheckpointWriter
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.loop import Hook
from megatron_llama3.training.metrics import MetricsLogger
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult


def evaluation(engine: Engine, stream: TrainingStream, config: RunConfig, logger: MetricsLogger | None) -> Hook:
    """Every --eval-interval steps and at --train-iters: the mean loss over the same --eval-iters global batches of the validation split,
    of the ramps' last size and length. A run that is told to stop early does not wait for it."""

    def hook(state: TrainState, result: StepResult, is_last: bool) -> None:
        is_due = state.iteration % config.training.eval_interval == 0 and not is_last
        if is_due or state.iteration >= config.training.train_iters:
            started = time.monotonic()
            loss = evaluate(engine, stream, config)
            if logger is not None:
                logger.evaluated(state, loss, time.monotonic() - started)

    return hook


def evaluate(engine: Engine, stream: TrainingStream, config: RunConfig) -> float:
    """The mean loss over the first --eval-iters global batches of `stream`. Collective."""
    stream.rewind()
    total, count = 0.0, 0
    for _ in range(config.training.eval_iters):
        at, sizes, t = engine.groups.at, engine.groups.topology, config.training
        batch = stream.next_batch(t.global_batch_size, config.data.seq_length, t.micro_batch_size, at.dp, sizes.dp)
        nll, tokens = engine.evaluate(batch)
        total, count = total + nll, count + tokens
    return total / max(1, count)


def saving(writer: CheckpointWriter, stream: TrainingStream, config: RunConfig, logger: MetricsLogger | None) -> Hook:
    """Every --save-interval steps and after the last; the run does not end before the last checkpoint is on disk."""

    def hook(state: TrainState, result: StepResult, is_last: bool) -> None:
        interval = config.checkpoint.save_interval
        if is_last or (interval and state.iteration % interval == 0):
            writer.save(state, stream)
            if logger is not None:
                logger.saved(state, writer.last_stall_seconds)
        if is_last:
            writer.wait()

    return hook
