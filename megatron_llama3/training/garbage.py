"""Python's garbage collected at the same steps on every rank: left alone, each rank stops at a step of its own and all wait for it."""

import gc

from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult


class ManualGarbageCollection:
    """A hook for `training.loop.train`. `interval`: steps between collections; 0: none after the first."""

    def __init__(self, interval: int):
        self.interval = interval
        gc.disable()
        gc.collect()

    def __call__(self, state: TrainState, result: StepResult, is_last: bool) -> None:
        if self.interval and state.iteration % self.interval == 0:
            gc.collect()
