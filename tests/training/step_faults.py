"""Faults of the optimizer step that every layout and both engines have alike, so that only an oracle from outside can see them.

Each is a patch to be planted in a process that ends, as in tests/planning/faults.py.
"""

from collections.abc import Callable

import torch

from megatron_llama3.training import learning_rate, loop
from megatron_llama3.training.engine import Engine
from tests.planning.faults import patch


def _scale_loss_and_gradients(factor_of: Callable) -> None:
    """`factor_of(batch)` multiplies the loss that is told and what AdamW gets."""
    factors = [1.0]

    def scaled_loss(original, self, batch, objective) -> dict[str, float]:
        factors[0] = factor_of(batch)
        return {term: mean * factors[0] for term, mean in original(self, batch, objective).items()}

    def scaled_gradients(original, self, *args) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factors[0])
        original(self, *args)

    patch(Engine, "forward_backward", scaled_loss)
    patch(torch.optim.AdamW, "step", scaled_gradients)


def _change_adamw(change: Callable[[dict], dict]) -> None:
    def changed(original, self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        for group in self.param_groups:
            group.update(change(group))

    patch(torch.optim.AdamW, "__init__", changed)


def _clip_at_half_the_limit() -> None:
    def halved(original, engine, *args):
        engine.clip_gradients, clip = (lambda limit: clip(limit / 2)), engine.clip_gradients
        try:
            return original(engine, *args)
        finally:
            del engine.clip_gradients

    patch(loop, "train_step", halved)


def _lag_the_rate() -> None:
    patch(learning_rate, "_rate", lambda original, config, at, *args: original(config, at - 1, *args))


STEP_FAULTS: dict[str, Callable[[], None]] = {
    "loss and gradients halved": lambda: _scale_loss_and_gradients(lambda batch: 0.5),
    "mean over masked targets": lambda: _scale_loss_and_gradients(lambda batch: batch.loss_mask.mean()),
    "no weight decay": lambda: _change_adamw(lambda group: {"weight_decay": 0.0}),
    "weight decay of norms": lambda: _change_adamw(lambda group: {"weight_decay": 0.1}),
    "betas swapped": lambda: _change_adamw(lambda group: {"betas": group["betas"][::-1]}),
    "epsilon ignored": lambda: _change_adamw(lambda group: {"eps": 1e-30}),
    "clipping at half the limit": _clip_at_half_the_limit,
    "the rate of the step before": _lag_the_rate,
}


def plant_all() -> None:
    """But for the two that would undo or hide each other."""
    for name, plant in STEP_FAULTS.items():
        if name not in ("mean over masked targets", "weight decay of norms"):
            plant()


def start_cpu_adam_at_step_1() -> None:
    from megatron_llama3.training.deepspeed_parts import OwnedParts

    def late(original, self) -> None:
        original(self)
        self.set_adam_step(1)

    patch(OwnedParts, "make_adam_state", late)
