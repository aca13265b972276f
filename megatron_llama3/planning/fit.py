"""Whether the fullest rank of a run fits its GPU, and if not, which flags would make it fit: each is tried on the planner's own timeline.

The timeline counts tensors. What a GPU holds besides is the reserve: NCCL's buffers (544 to 688 MB a group on A100s with NVLink by
NVIDIA/nccl issue 964; a rank is in about five: world, TP, PP, DP, DP x CP), the CUDA context (about 0.5 GiB) and what the allocator loses
to fragmentation. The default, 5 GiB, is assumed and not measured. Imports no torch.
"""

from copy import deepcopy
from dataclasses import dataclass

from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import Phase
from megatron_llama3.config.validate import flag, refusals, resolve
from megatron_llama3.planning.memory import peak_memory

GIB = 2**30


@dataclass(frozen=True)
class Change:
    """Flags that would be given, and how many bytes would be free with them."""

    flags: str
    spare: float


def spare_bytes(config: RunConfig, needed: int) -> float:
    """Bytes of the GPU that stay free beside the reserve; below 0 if `needed` does not fit."""
    p = config.parallel
    return (p.device_memory_gib - p.device_memory_reserve_gib) * GIB - needed


def changes_that_fit(config: RunConfig, phase: Phase, count: int = 2) -> list[Change]:
    """The first of these that fit, in order of what they cost in speed; none that only adds to one that fits already."""
    found, sufficient = [], []
    for fields in _candidates(config):
        if any(fewer.items() <= fields.items() for fewer in sufficient):
            continue
        changed = deepcopy(config)
        for name, value in fields.items():
            setattr(changed.parallel, name, value)
        resolve(changed)
        if list(refusals(changed)):
            continue
        spare = spare_bytes(changed, peak_memory(changed, phase).total)
        if spare >= 0:
            found.append(Change(" ".join(_as_flags(fields, config)), spare))
            sufficient.append(fields)
        if len(found) == count:
            break
    return found


def _candidates(config: RunConfig) -> list[dict]:
    """Fields of ParallelConfig to set together: first what costs next to nothing, then recomputation, then other degrees."""
    p = config.parallel
    sequence = {} if p.sequence_parallel or p.tensor_model_parallel_size == 1 else {"sequence_parallel": True}
    norms = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    groups = {"reduce_gradients_every": p.microbatch_group_size_per_vp_stage or p.pipeline_model_parallel_size}
    whole = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1, "recompute_modules": []}
    degrees = [
        {name: 2 * getattr(p, name)}
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        if name != "tensor_model_parallel_size" or p.tensor_model_parallel_size < 8  # a node's GPUs
    ]
    cheap = [sequence, norms, groups, norms | groups, whole, whole | groups]
    return (
        [sequence | change for change in cheap if sequence | change]
        + [sequence | change for change in degrees]
        + [sequence | whole | change for change in degrees]
    )


def _as_flags(fields: dict, config: RunConfig) -> list[str]:
    """To append to the run's own: a list that gets empty is a flag without words."""
    given = {name: value for name, value in fields.items() if value is not None and value != getattr(config.parallel, name)}
    words = {name: " ".join(value) if isinstance(value, list) else str(value) for name, value in given.items()}
    return [flag(name) if given[name] in (True, []) else f"{flag(name)} {text}" for name, text in words.items()]
