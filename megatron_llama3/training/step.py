"""The optimizer step, whole: what a run repeats until it ends."""

from typing import NamedTuple

from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import phase_at
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.training.bad_steps import note_step, reason_to_skip
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.learning_rate import next_learning_rate
from megatron_llama3.training.objectives import Objective
from megatron_llama3.training.state import TrainState


class StepResult(NamedTuple):
    loss: float
    """mean over what the objective counts in the global batch: real tokens"""
    gradient_norm: float
    """before clipping"""
    lr: float
    global_batch_size: int
    seq_length: int
    skipped: str | None = None
    """why the weights were left as they were, if they were"""
    layer_gradient_norms: dict[str, float] | None = None
    """before clipping, where --layer-norms-interval asks for them"""


def train_step(engine: Engine, stream: TrainingStream, state: TrainState, config: RunConfig, objective: Objective) -> StepResult:
    """Advances engine, stream and state by one optimizer step. Collective; the result is the same on every rank."""
    # Batch size and sequence length follow the paper's ramps, by tokens seen.
    global_batch_size, seq_length = phase_at(config, state.consumed_tokens)
    at, sizes = engine.groups.at, engine.groups.topology
    wanted = (global_batch_size, seq_length, config.training.micro_batch_size, at.dp, sizes.dp)
    batch = stream.next_batch(*wanted)
    stream.read_ahead(*wanted)  # the next step's, while this one computes

    lr = next_learning_rate(config, state, global_batch_size)
    means = engine.forward_backward(batch, objective)
    loss = means["loss"]
    every = config.logging.layer_norms_interval
    layer_norms = engine.layer_gradient_norms() if every is not None and (state.iteration + 1) % every == 0 else None
    norm = engine.clip_gradients(config.optimizer.clip_grad)
    # A bad step changes no weight, no moment and no schedule; the data moves on.
    skipped = reason_to_skip(means, norm, state, config.training)
    if skipped is None:
        engine.optimizer_step(lr)
    else:
        engine.skip_step()

    note_step(state, loss, skipped is not None, config.training)
    state.consumed_samples += global_batch_size
    state.consumed_tokens += global_batch_size * seq_length
    state.lost_samples += global_batch_size * (skipped is not None)
    return StepResult(loss, norm, lr, global_batch_size, seq_length, skipped, layer_norms)
