"""The optimizer step, whole: what a run repeats until it ends."""

import math
from typing import NamedTuple

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import phase_at
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.learning_rate import learning_rate
from megatron_llama3.training.state import TrainState


class StepResult(NamedTuple):
    loss: float
    """mean over the real tokens of the global batch"""
    gradient_norm: float
    """before clipping"""
    lr: float
    global_batch_size: int
    seq_length: int


def train_step(engine: Engine, stream: TrainingStream, state: TrainState, config: RunConfig) -> StepResult:
    """Advances engine, stream and state by one optimizer step. Collective; the result is the same on every rank."""
    # Batch size and sequence length follow the paper's ramps, by tokens seen.
    global_batch_size, seq_length = phase_at(config, state.consumed_tokens)
    at, sizes = engine.groups.at, engine.groups.topology
    batch = stream.next_batch(global_batch_size, seq_length, config.training.micro_batch_size, at.dp, sizes.dp)

    lr = learning_rate(config.optimizer, state.iteration + 1, config.training.train_iters)
    loss = engine.forward_backward(batch)
    norm = engine.clip_gradients(config.optimizer.clip_grad)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        step = state.iteration + 1
        raise UserError(f"iteration {step}: loss {loss}, gradient norm {norm}: resume from the last checkpoint, perhaps with a lower --lr")
    engine.optimizer_step(lr)

    state.iteration += 1
    state.consumed_samples += global_batch_size
    state.consumed_tokens += global_batch_size * seq_length
    return StepResult(loss, norm, lr, global_batch_size, seq_length)
