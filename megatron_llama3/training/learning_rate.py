"""The learning rate by optimizer step: linear warm-up, then cosine or linear decay to a floor, or constant (paper, section 3.4.1)."""

import math

from megatron_llama3.config.run import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, train_iters: int) -> float:
    """The rate of optimizer step `step`, counted from 1. Decay ends at `lr_decay_iters` (default: `train_iters`); the floor holds after."""
    if step <= config.lr_warmup_iters:
        return config.lr * step / config.lr_warmup_iters
    if config.lr_decay_style == "constant":
        return config.lr
    decay_iters = config.lr_decay_iters or train_iters
    progress = min(1.0, (step - config.lr_warmup_iters) / max(1, decay_iters - config.lr_warmup_iters))
    remaining = 1 - progress if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * remaining
