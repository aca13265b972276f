"""The learning rate by optimizer step: linear warm-up, then cosine or linear decay to a floor, or constant (paper, section 3.4.1)."""

import math

from megatron_llama3.config.run import OptimizerConfig, RunConfig
from megatron_llama3.training.state import TrainState


def next_learning_rate(config: RunConfig, state: TrainState, global_batch_size: int) -> float:
    """The rate of the update that comes next, from a batch of so many sequences. A run told in sequences (--train-samples) counts those
    that the weights are made of, any other its updates."""
    optimizer, training = config.optimizer, config.training
    if training.train_samples is None:
        return learning_rate(optimizer, state.updates + 1, training.train_iters)
    end = optimizer.lr_decay_samples or training.train_samples
    return _rate(optimizer, state.update_samples + global_batch_size, optimizer.lr_warmup_samples, end)


def learning_rate(config: OptimizerConfig, step: int, train_iters: int) -> float:
    """The rate of optimizer step `step`, counted from 1. Decay ends at `lr_decay_iters` (default: `train_iters`); the floor holds after."""
    return _rate(config, step, config.lr_warmup_iters, config.lr_decay_iters or train_iters)


def _rate(config: OptimizerConfig, at: int, warmup: int, end: int) -> float:
    """The rate at `at`, all three in one unit: steps or sequences."""
    if at <= warmup:
        return config.lr * at / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    progress = min(1.0, (at - warmup) / max(1, end - warmup))
    remaining = 1 - progress if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * remaining
