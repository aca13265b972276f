"""Trains a small model under a layout on forked gloo ranks, under one process and by the plain reference, and compares every number (the
project's contract).

Bounds: losses over 20 steps within 1e-6 and first gradients within 1e-5 of their tensor's norm in fp32; 1e-10 in fp64, weights after
the steps within 1e-8. In bf16 the error against fp32 is at most twice that of one bf16 process.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.tensor_parallel import local_part
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.planning.plain_training import Sequence, Settings, Trainer
from megatron_llama3.planning.synthetic_batch import synthetic_batch
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.objectives import NextToken

BOUNDS = {
    "fp64": {"loss": 1e-10, "norm": 1e-10, "gradient": 1e-10, "later_norms": 1e-10, "weight": 1e-8, "copies": 0.0},
    "fp32": {"loss": 1e-6, "norm": 1e-6, "gradient": 1e-5, "copies": 0.0},
}


@dataclass
class Trace:
    """What a run left: losses and gradient norms of each step, whole gradients of the first step, whole weights after the last.

    `copies` is how far two ranks' copies of one tensor lie apart at most (replicated weights, the second tied embedding), relative.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    copies: float = 0.0


@dataclass
class Difference:
    """The largest deviation of each kind: losses and gradient norms relative, gradients and weights relative to their tensor's norm.

    `loss_rms` is the root mean square over the steps instead of the largest, `all_gradients` the norm of all gradients' error together
    over the norm of all gradients, `norm` the first step's: later ones follow the weights, which Adam moves apart where a gradient is near
    zero (one element of 1e-9 among 1e-3 is enough). What is not finite counts as infinite.
    """

    loss: float
    loss_rms: float
    norm: float
    later_norms: float
    gradient: float
    all_gradients: float
    weight: float
    copies: float
    worst_gradient: str


def compare(trace: Trace, reference: Trace) -> Difference:
    def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
        if ours.keys() != theirs.keys():
            raise AssertionError(f"one run lacks these tensors: {sorted(ours.keys() ^ theirs.keys())}")
        return max((_relative_error(ours[n], theirs[n]), n) for n in theirs)

    gradient, name = worst(trace.gradients, reference.gradients)
    ours, theirs = (torch.cat([t.gradients[n].double().flatten() for n in sorted(t.gradients)]) for t in (trace, reference))
    losses = [*map(_relative, trace.losses, reference.losses)]
    return Difference(
        loss=max(losses),
        loss_rms=math.sqrt(sum(x * x for x in losses) / len(losses)),
        norm=_relative(trace.norms[0], reference.norms[0]),
        later_norms=max(map(_relative, trace.norms, reference.norms)),
        gradient=gradient,
        all_gradients=_relative_error(ours, theirs),
        weight=worst(trace.weights, reference.weights)[0],
        copies=trace.copies,
        worst_gradient=name,
    )


def _relative(a: float, b: float) -> float:
    return _finite(abs(a - b) / max(abs(b), 1e-30))


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return _finite(((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item())


def _finite(x: float) -> float:
    """NaN compares false with everything, so that `max` would lose it."""
    return x if math.isfinite(x) else math.inf


def train_under(config: RunConfig, steps: int, trainable=lambda name: True, before=lambda: None) -> Trace:
    """The trace of `config` on as many forked ranks as its layout has. `before()` runs on each rank first (planted faults)."""
    results = run_ranks(config.parallel.world_size, train_rank, config, steps, trainable, before)
    whole = Trace(results[0].losses, results[0].norms, {}, {})
    for result in results:
        for mine, theirs in ((whole.gradients, result.gradients), (whole.weights, result.weights)):
            apart = [_relative_error(theirs[n], mine[n]) for n in theirs.keys() & mine.keys()]
            whole.copies = max([whole.copies, *apart])
            mine |= theirs
    return whole


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
        losses.append(engine.forward_backward(batch, NextToken())["loss"])
        if step == 0:
            gradients = whole_gradients(engine)
        norms.append(engine.clip_gradients(config.optimizer.clip_grad))
        engine.optimizer_step(config.optimizer.lr)
    state = engine.state_tensors(with_optimizer=False)
    weights = {n.removeprefix("model."): _whole(t) for n, t in state.items()}
    return Trace(losses, norms, _kept(gradients, engine), _kept(weights, engine))


def train_reference(config: RunConfig, steps: int) -> Trace:
    """What the plain reference leaves of the same run, in float64 whatever `config` computes in; every weight is trained."""
    (trace,) = run_ranks(1, _train_reference, config, steps)
    return trace


def _train_reference(config: RunConfig, steps: int) -> Trace:
    trainer = Trainer(_settings_of(config))
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        batch = synthetic_batch(config, step, 0, 1)
        arrays = (batch.tokens, batch.targets, batch.loss_mask, batch.document_ids, batch.position_ids)
        loss, norm, _ = trainer.step([Sequence(*rows) for rows in zip(*(a.reshape(-1, config.data.seq_length) for a in arrays))])
        losses.append(loss)
        norms.append(norm)
        gradients = gradients or trainer.gradients
    return Trace(losses, norms, gradients, trainer.weights)


def _settings_of(config: RunConfig) -> Settings:
    """By the names of the flags; the rate is the peak rate in every step, as in `train_rank`."""
    flags = vars(config.model) | vars(config.data) | vars(config.optimizer) | vars(config.training)
    flags |= {"kv_channels": config.model.head_dim, "min_lr": config.optimizer.lr, "lr_warmup_iters": 0, "lr_decay_iters": 1}
    return Settings(**{field.name: flags[field.name] for field in fields(Settings)})


def _kept(tensors: dict[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    """Of the DP and CP ranks the first hands in its tensors; of the TP ranks the first, and the others what they hold a copy of."""
    at = engine.groups.at
    if at.dp or at.cp:
        return {}
    return {n: t for n, t in tensors.items() if at.tp == 0 or engine.weight(n).split_dim_at(engine.tp.size) is None}


def whole_gradients(engine: Engine) -> dict[str, Tensor]:
    """Each weight's summed gradient as one tensor (collective)."""
    gradients = {name: engine.gradient_of(name) for name, _ in engine.named_weights()}
    return {name: _whole(gradient) for name, gradient in gradients.items() if gradient is not None}


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else local_part(tensor)).detach().clone()
