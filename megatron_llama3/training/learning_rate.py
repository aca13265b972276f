"""The learning rate by optimizer step: linear warm-up, then cosine or linear decay to a floor (paper, section 3.4.1), a stable
middle and a decay at the end (WSD), or constant."""

import math

from megatron_llama3.config.run import OptimizerConfig, RunConfig
from megatron_llama3.training.state import TrainState


def next_learning_rate(config: RunConfig, state: TrainState, global_batch_size: int) -> float:
    """The rate of the update that comes next, from a batch of so many sequences. A run told in sequences (--train-samples) counts those
    that the weights are made of, any other its updates."""
    o, training = config.optimizer, config.training
    if training.train_samples is None:
        return learning_rate(o, state.updates + 1, training.train_iters)
    at, end = state.update_samples + global_batch_size, o.lr_decay_samples or training.train_samples
    return _rate(o, at, o.lr_warmup_samples, end, o.lr_wsd_decay_samples)


def learning_rate(config: OptimizerConfig, step: int, train_iters: int) -> float:
    """The rate of optimizer step `step`, counted from 1. Decay ends at `lr_decay_iters` (default: `train_iters`); the floor holds after."""
    return _rate(config, step, config.lr_warmup_iters, config.lr_decay_iters or train_iters, config.lr_wsd_decay_iters)


def _rate(config: OptimizerConfig, at: int, warmup: int, end: int, wsd_decay: int | None) -> float:
    """The rate at `at`; all numbers in one unit, steps or sequences."""
    if at <= warmup:
        return config.lr * at / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if config.lr_decay_style == "WSD":  # warm-up, a stable middle, a decay over the last part
        shape, begin = config.lr_wsd_decay_style, end - wsd_decay
    else:
        shape, begin = config.lr_decay_style, warmup
    progress = min(1.0, max(0, at - begin) / max(1, end - begin))
    return config.min_lr + (config.lr - config.min_lr) * _SHAPES[shape](progress)


_SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}
"""What is left of the way from the peak to the floor, by progress from 0 to 1; Megatron-LM's names and formulas."""
