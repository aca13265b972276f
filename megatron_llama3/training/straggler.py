"""Names slow ranks (--log-straggler). A step takes as long on every rank, since all wait for the slowest: what is compared is how long a
rank worked, not how long its steps took.

A thread looks 50 times a second whether the training thread works or waits for other ranks. On a GPU, where the training thread says
little about the device, a matrix product of fixed size is timed as well.
"""

import socket
import threading
import time
from statistics import median

import torch
import torch.distributed as dist

from megatron_llama3.config.run import LoggingConfig
from megatron_llama3.parallel.groups import ParallelGroups
from megatron_llama3.training.events import EventLog
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult
from megatron_llama3.training.whereabouts import place_of_thread

SAMPLING_SECONDS = 0.02
NEGLIGIBLE_SECONDS = 0.005  # a step: less of own work than this is noise
PROBE_SIZE, PROBE_REPEATS = 4096, 8


class StragglerReport:
    """A hook for `training.loop.train`, on every rank."""

    def __init__(self, config: LoggingConfig, groups: ParallelGroups, events: EventLog):
        self.config, self.groups, self.events = config, groups, events
        self.thread = threading.get_ident()
        self.worked, self.steps = 0.0, 0
        self.host = socket.gethostname()
        self.probe = _Probe(groups.device) if groups.device.type == "cuda" else None
        threading.Thread(target=self._sample, name="straggler", daemon=True).start()

    def __call__(self, state: TrainState, result: StepResult, is_last: bool) -> None:
        self.steps += 1
        if state.iteration % self.config.straggler_interval:
            return
        here = {"own work a step": self.worked / self.steps, "a fixed matrix product": self.probe.seconds() if self.probe else 0.0}
        self.worked, self.steps = 0.0, 0
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (self.host, here), group=self.groups.control)
        if self.groups.rank == 0:
            for rank, measure, factor in slow_ranks([times for _, times in everywhere], self.config.straggler_factor):
                self._report(state, rank, *everywhere[rank], measure, factor)

    def _report(self, state: TrainState, rank: int, host: str, times: dict[str, float], measure: str, factor: float) -> None:
        line = f"rank {rank} on {host} took {times[measure]:.4f} s for {measure}, {factor:.2f} x the median of all ranks"
        print(f"straggler: iteration {state.iteration} | {line}", flush=True)
        self.events.add("straggler", iteration=state.iteration, rank=rank, host=host, measure=measure, factor=factor)

    def _sample(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(SAMPLING_SECONDS)
            now = time.monotonic()
            place = place_of_thread(self.thread, self.probe is not None)
            if place.is_training and not place.is_waiting:
                self.worked += now - last  # seconds, to within a sample
            last = now


def slow_ranks(times: list[dict[str, float]], factor: float) -> list[tuple[int, str, float]]:
    """(rank, measure, how many times the median) of each rank that is above `factor` in a measure, in seconds."""
    found = []
    for measure in times[0]:
        # The median, since a mean would follow the slow rank itself.
        usual = max(median(t[measure] for t in times), NEGLIGIBLE_SECONDS)
        found += [(rank, measure, t[measure] / usual) for rank, t in enumerate(times) if t[measure] > factor * usual]
    return found


class _Probe:
    """Seconds of a few large matrix products on this rank's GPU, by its own clock."""

    def __init__(self, device: torch.device):
        self.matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=torch.bfloat16, device=device)

    def seconds(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(PROBE_REPEATS):
            self.matrix @ self.matrix
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
