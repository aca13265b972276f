"""Steps until the run ends, with hooks between them. Hooks are handed in by the recipe and run in the order in which they are listed."""

import signal
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult, train_step

Hook = Callable[[TrainState, StepResult, bool], None]
"""Called after each step with the state, the step's result, and whether it was the last."""


def train(engine: Engine, stream: TrainingStream, state: TrainState, config: RunConfig, hooks: Sequence[Hook]) -> str:
    """Runs to `train_iters` or to the first reason to stop earlier. Returns why it stopped."""
    stop = StopReasons(config, engine)
    while state.iteration < config.training.train_iters:
        result = train_step(engine, stream, state, config)
        reason = stop.after(state)
        for hook in hooks:
            hook(state, result, reason is not None)
        if reason is not None:
            return reason
    return "nothing left to do: --train-iters is reached already"


class StopReasons:
    """--train-iters, --exit-interval, --exit-duration-in-mins and --exit-signal-handler (SIGTERM), agreed on by all ranks."""

    def __init__(self, config: RunConfig, engine: Engine):
        self.training, self.control = config.training, engine.groups.control
        self.started = time.monotonic()
        self.signalled = False
        if self.training.exit_signal_handler:
            signal.signal(signal.SIGTERM, self._on_signal)

    def after(self, state: TrainState) -> str | None:
        t = self.training
        if state.iteration >= t.train_iters:
            return "--train-iters is reached"
        if t.exit_interval and state.iteration % t.exit_interval == 0:
            return "--exit-interval is reached"
        if t.exit_duration_in_mins and self._any_rank(time.monotonic() - self.started > 60 * t.exit_duration_in_mins):
            return "--exit-duration-in-mins is over"
        if t.exit_signal_handler and self._any_rank(self.signalled):
            return "SIGTERM was received"
        return None

    def _on_signal(self, *_) -> None:
        self.signalled = True

    def _any_rank(self, here: bool) -> bool:
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return bool(flag)
