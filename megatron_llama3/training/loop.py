"""Steps until the run ends, with hooks between them. Hooks are handed in by the recipe and run in the order in which they are listed."""

import time
from collections.abc import Callable, Sequence

from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.objectives import Objective
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult, train_step
from megatron_llama3.training.stop import StopReasons

Hook = Callable[[TrainState, StepResult, bool], None]
"""Called after each step with the state, the step's result, and whether it was the last."""


def train(
    engine: Engine,
    objective: Objective,
    stream: TrainingStream,
    state: TrainState,
    config: RunConfig,
    hooks: Sequence[Hook],
    stop: StopReasons,
) -> str:
    """Runs to `train_iters` or to the first reason to stop earlier. Returns why it stopped."""
    while state.iteration < config.training.train_iters:
        started = time.monotonic()
        result = train_step(engine, stream, state, config, objective)
        if result.skipped is None:
            state.useful_seconds += time.monotonic() - started
        reason = stop.after(state, engine.groups.control)
        # Hooks hear whether this step was the last, so that it is saved.
        for hook in hooks:
            hook(state, result, reason is not None)
        if reason is not None:
            return reason
    return "nothing left to do: --train-iters is reached already"
