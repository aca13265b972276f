"""Why a run ends between two steps, agreed on by all ranks, and the exit status that follows. Imports torch only when asked to agree."""

import os
import signal
import sys
import time

from megatron_llama3.config.run import RunConfig
from megatron_llama3.training.state import TrainState

RESTART_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong with the run, and started again it goes on. scripts/pretrain.sbatch requeues itself on it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
IMPATIENT_SECONDS = 3.0
"""A second Ctrl-C after so long ends the process at once; a launcher passes the first one on, so that a rank gets it twice."""


class StopReasons:
    """--train-iters, --exit-interval, --exit-duration-in-mins (counted from here), Ctrl-C, and --exit-signal-handler (SIGTERM, SIGUSR1).

    Made as the first thing of a run, so that a signal during its start is kept until the first step is done and saved.
    """

    def __init__(self, config: RunConfig):
        self.training = config.training
        self.started = time.monotonic()
        self.signalled, self.interrupted = 0, 0.0
        signal.signal(signal.SIGINT, self._on_interrupt)
        if self.training.exit_signal_handler:
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def after(self, state: TrainState, control) -> str | None:
        """The reason to stop after this step, the same on every rank of the `control` process group (collective)."""
        t = self.training
        if state.iteration >= t.train_iters:
            return "--train-iters is reached"
        if t.exit_interval and state.iteration % t.exit_interval == 0:
            return "--exit-interval is reached"
        # Clocks and signals differ from rank to rank, so that these two are agreed on; what stands above is the same everywhere.
        if t.exit_duration_in_mins and _largest(time.monotonic() - self.started > 60 * t.exit_duration_in_mins, control):
            return "--exit-duration-in-mins is over"
        return f"{signal.Signals(self.signalled).name} was received" if self.is_hurried(control) else None

    def is_hurried(self, control) -> bool:
        """Whether a signal came, to any rank of the `control` process group (collective)."""
        self.signalled = _largest(self.signalled, control)
        return bool(self.signalled)

    def exit_status(self, state: TrainState) -> int:
        """RESTART_STATUS where a signal cut the run short; 0 where it is done, or was told beforehand to end here."""
        return RESTART_STATUS if self.signalled and state.iteration < self.training.train_iters else 0

    def _on_signal(self, number: int, _frame) -> None:
        self.signalled = number

    def _on_interrupt(self, number: int, _frame) -> None:
        now = time.monotonic()
        if self.signalled and now - self.interrupted > IMPATIENT_SECONDS:
            raise KeyboardInterrupt
        if not self.signalled and os.environ.get("RANK", "0") == "0":
            print("\ninterrupted: the run saves and ends after this step (again: at once, without saving)", file=sys.stderr, flush=True)
        self.signalled, self.interrupted = number, now


def _largest(here: int, control) -> int:
    import torch
    import torch.distributed as dist

    value = torch.tensor(int(here))
    dist.all_reduce(value, dist.ReduceOp.MAX, group=control)
    return int(value)
