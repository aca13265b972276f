"""The small runs of a certificate: the model made small, the layout kept.

An axis keeps its size in some trial if it fits on 8 processes, and every set of axes that fits is tried together, each above 1 at 2 or
more. Schedule, V, N against PP, M against PP, uneven and empty stages, engine, recomputation, tied embeddings, dtype and the ratio of KV
heads to TP are kept.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import batch_size_steps
from megatron_llama3.planning.small_run import accounted, small_run

MAX_RANKS = 8
AXES = ("tp", "cp", "pp", "dp")


@dataclass
class Trial:
    """One small run: `axes` are its sizes of TP, CP, PP and DP, `microbatches` is its M."""

    config: RunConfig
    axes: dict[str, int]
    microbatches: int


def describe(trial: Trial) -> str:
    axes = product_of(trial.axes, [axis for axis in AXES if trial.axes[axis] > 1])
    return f"{axes or 'one process'}, M {trial.microbatches}"


def product_of(sizes: dict[str, int], axes: Iterable[str]) -> str:
    return " x ".join(f"{axis.upper()} {sizes[axis]}" for axis in axes)


def sizes_of_axes(p: ParallelConfig) -> dict[str, int]:
    sizes = (p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size, p.data_parallel_size)
    return dict(zip(AXES, sizes))


def make_trials(config: RunConfig) -> list[Trial]:
    """Those of `_axes_to_try`; one more for each way in which M stands to PP in the ramp."""
    *others, last = microbatch_classes(config)
    trials = [_trial(config, axes, last) for axes in _axes_to_try(config, last)]
    if config.parallel.pipeline_model_parallel_size > 1:
        trials += [_trial(config, next(a for a in _axes_to_try(config, other) if a["pp"] > 1), other) for other in others]
    return trials


def _axes_to_try(config: RunConfig, microbatch_class: str) -> list[dict[str, int]]:
    """The sizes of the axes: for each set of axes that fits and is part of no larger one, and for each axis that has its own size in none
    of these though it fits. What room is left goes to sizes nearer to the run's."""
    own = sizes_of_axes(config.parallel)
    tp, pp = _small_tp(config), _small_pp(config, microbatch_class)
    small = {"tp": tp, "cp": min(own["cp"], 2), "pp": pp, "dp": min(own["dp"], 2)}
    wanted = {axis: size if size <= MAX_RANKS else small[axis] for axis, size in own.items()}
    used = [axis for axis in AXES if small[axis] > 1]
    fitting = [c for n in range(len(used), -1, -1) for c in combinations(used, n) if math.prod(small[a] for a in c) <= MAX_RANKS]
    largest = [chosen for chosen in fitting if not any(set(chosen) < set(other) for other in fitting)]
    tries = [_grown({a: small[a] if a in chosen else 1 for a in AXES}, wanted) for chosen in largest]
    for axis in used:
        if all(sizes[axis] < wanted[axis] for sizes in tries):
            tries.append(_grown({a: wanted[a] if a == axis else 1 for a in AXES}, small))
    return tries


def _grown(sizes: dict[str, int], wanted: dict[str, int]) -> dict[str, int]:
    """`sizes` with one axis after the other as large as wanted, where that fits."""
    for axis in AXES:
        larger = sizes | {axis: max(sizes[axis], wanted[axis])}
        if math.prod(larger.values()) <= MAX_RANKS:
            sizes = larger
    return sizes


def _small_tp(config: RunConfig) -> int:
    """2, or as many ranks as share one KV head where that is more."""
    tp, kv = config.parallel.tensor_model_parallel_size, config.model.num_query_groups
    return 1 if tp == 1 else min(max(2, tp // kv), MAX_RANKS)


def _small_pp(config: RunConfig, microbatch_class: str) -> int:
    """2, or 3 where the first or last rank differs from those between them, or M is to lie between 1 and PP."""
    p = config.parallel
    uneven = p.decoder_first_pipeline_num_layers or p.decoder_last_pipeline_num_layers or (accounted(p) and p.chunks_per_rank == 1)
    return min(p.pipeline_model_parallel_size, 3 if uneven or microbatch_class == "M < PP" else 2)


def microbatch_classes(config: RunConfig) -> list[str]:
    """How M stands to PP in each phase of the batch ramp, without repetition, the last phase last."""
    p, per_pass = config.parallel, config.training.micro_batch_size * config.parallel.data_parallel_size
    classes = []
    for _, size in batch_size_steps(config):
        m, pp = size // per_pass, p.pipeline_model_parallel_size
        classes.append("M = 1" if m == 1 else "M < PP" if m < pp else "M a multiple of PP" if m % pp == 0 else "M no multiple of PP")
    return list(dict.fromkeys(reversed(classes)))[::-1]


def _trial(config: RunConfig, axes: dict[str, int], microbatch_class: str) -> Trial:
    pp = axes["pp"]
    # A trial without the pipeline keeps the number of micro-batches above 1 if the run has it.
    m = {"M = 1": 1, "M < PP": max(pp - 1, 1), "M a multiple of PP": 2 * pp, "M no multiple of PP": 2 * pp + 1}[microbatch_class]
    return Trial(small_run(config, axes, m), axes, m)
