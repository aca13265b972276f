"""Trains a small model under a layout on forked gloo ranks and under one process, and compares every number (the project's contract).

Bounds: losses over 20 steps within 1e-6 and first gradients within 1e-5 of their tensor's norm in fp32; 1e-10 in fp64, weights after
the steps within 1e-8. In bf16 the error against fp32 is at most twice that of one bf16 process.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import Batch
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.tensor_parallel import local
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.engine import Engine


@dataclass
class Trace:
    """What a run left: losses and gradient norms of each step, whole gradients of the first step, whole weights after the last."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass
class Difference:
    """The largest deviation of each kind: loss relative, gradient and weight relative to their tensor's norm."""

    loss: float
    norm: float
    gradient: float
    weight: float
    worst_gradient: str


def compare(trace: Trace, reference: Trace) -> Difference:
    def relative(a: float, b: float) -> float:
        return abs(a - b) / max(abs(b), 1e-30)

    def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
        assert ours.keys() == theirs.keys(), f"tensors differ: {sorted(ours.keys() ^ theirs.keys())}"
        return max((_relative_error(ours[n].double(), theirs[n].double()), n) for n in theirs)

    gradient, name = worst(trace.gradients, reference.gradients)
    return Difference(
        loss=max(map(relative, trace.losses, reference.losses)),
        norm=max(map(relative, trace.norms, reference.norms)),
        gradient=gradient,
        weight=worst(trace.weights, reference.weights)[0],
        worst_gradient=name,
    )


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def train_under(config: RunConfig, steps: int, trainable=lambda name: True, before=lambda: None) -> Trace:
    """The trace of `config` on as many forked ranks as its layout has. `before()` runs on each rank first (planted faults)."""
    results = run_ranks(config.parallel.world_size, train_rank, config, steps, trainable, before)
    first = results[0]
    gradients, weights = {}, {}
    for result in results:
        gradients |= result.gradients
        weights |= result.weights
    return Trace(first.losses, first.norms, gradients, weights)


def one_process(config: RunConfig) -> RunConfig:
    """The same run without any parallelism, recomputation or compilation, on plain tensors."""
    config = deepcopy(config)
    config.parallel = type(config.parallel)()
    return config


def train_rank(config: RunConfig, steps: int, trainable, before) -> Trace:
    before()
    groups = initialize_groups(config.parallel)
    engine = build_engine(config, groups, trainable)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        batch = synthetic_batch(config, step, groups.at.dp, groups.topology.dp)
        losses.append(engine.forward_backward(batch))
        if step == 0:
            gradients = whole_gradients(engine)
        norms.append(engine.clip_gradients(config.optimizer.clip_grad))
        engine.optimizer_step(config.optimizer.lr)
    state = engine.state_tensors(with_optimizer=False)
    weights = {n.removeprefix("model."): _whole(t) for n, t in state.items()}
    keep = engine.tp.rank == 0 and groups.at.dp == 0 and groups.at.cp == 0
    return Trace(losses, norms, gradients if keep else {}, weights if keep else {})


def whole_gradients(engine: Engine) -> dict[str, Tensor]:
    """Each weight's summed gradient as one tensor (collective)."""
    return {name: _whole(p.grad) for name, p in engine.named_parameters() if p.grad is not None}


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else local(tensor)).detach().clone()


def synthetic_batch(config: RunConfig, step: int, dp_rank: int, dp_size: int) -> Batch:
    """This rank's part of a global batch that depends on (seed, step) alone: packed documents of random lengths, targets that do not
    count at borders and at random, more of them the later the sequence, and none at all in the last one."""
    rng = np.random.default_rng([config.training.seed, step])
    g, b, s = config.training.global_batch_size, config.training.micro_batch_size, config.data.seq_length
    stream = rng.integers(0, config.model.vocab_size, (g, s + 1))
    new_document = rng.random((g, s)) < 4 / s
    new_document[:, 0] = False
    document_ids = new_document.cumsum(1).astype(np.int32)
    mask = rng.random((g, s)) > np.linspace(0, 0.7, g)[:, None]
    mask[:, :-1] &= ~new_document[:, 1:]
    if g > 1:
        mask[-1] = False
    arrays = Batch(
        tokens=stream[:, :-1],
        targets=stream[:, 1:],
        loss_mask=mask,
        document_ids=document_ids,
        position_ids=np.broadcast_to(np.arange(s), (g, s)),
    )
    return Batch(*(a.reshape(g // (b * dp_size), dp_size, b, s)[:, dp_rank] for a in arrays))


def with_layout(config: RunConfig, **layout) -> RunConfig:
    """A copy under another layout; `layout` are fields of ParallelConfig."""
    config = deepcopy(config)
    config.parallel = replace(config.parallel, **layout)
    return config
