"""What a run leaves for a profiler: traces over a window of steps (--profile), the history of the GPU's memory (--record-memory-history).

Traces open in Perfetto or chrome://tracing, snapshots in https://pytorch.org/memory_viz.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.storage import words
from megatron_llama3.training.events import log_folder
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult


class Profile:
    """A hook for `training.loop.train`: traces the steps after `profile_step_start` up to `profile_step_end`, on the ranks of
    `profile_ranks`, into profile/rank<R>_steps<A>-<B>.json.gz of the log folder. Steps count from the start of the whole run."""

    def __init__(self, config: RunConfig, rank: int):
        log = config.logging
        self.first, self.last = log.profile_step_start, log.profile_step_end
        self.is_mine = rank in log.profile_ranks
        self.path = log_folder(config) / "profile" / f"rank{rank}_steps{self.first + 1}-{self.last}.json.gz"
        self.profiler = None

    def __call__(self, state: TrainState, result: StepResult, is_last: bool) -> None:
        if self.profiler is not None and (state.iteration >= self.last or is_last):
            self.profiler.stop()
            _written(self.path, self.profiler.export_chrome_trace)
            self.profiler = None
        elif self.is_mine and state.iteration == self.first and not is_last:
            self.profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self.profiler.start()


@contextmanager
def memory_history(config: RunConfig, rank: int) -> Iterator[None]:
    """Under --record-memory-history: what the CUDA allocator did in the block, in memory/rank<R>.pickle of the log folder, also where the
    block ends for want of memory. Raises UserError without a GPU."""
    if not config.logging.record_memory_history:
        yield
        return
    if not torch.cuda.is_available():
        raise UserError("--record-memory-history is about a GPU's memory, and this run has none: leave it out")
    torch.cuda.memory._record_memory_history()
    try:
        yield
    finally:
        _written(log_folder(config) / "memory" / f"rank{rank}.pickle", torch.cuda.memory._dump_snapshot)


def _written(path: Path, write: Callable[[str], None]) -> None:
    """Training does not end for want of a file to look at."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(path))
    except (OSError, RuntimeError) as error:
        print(f"{path}: could not be written: {words(error)}", file=sys.stderr, flush=True)
