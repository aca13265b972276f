"""Which steps are not taken: a loss or gradient that is not finite, and on request a loss far above the recent ones.

The answer depends on numbers that are the same on every rank, and on what a checkpoint keeps, so that every rank and every resumed run
gives the same one.
"""

import math
from statistics import median

from megatron_llama3.config.run import TrainingConfig
from megatron_llama3.training.state import TrainState

WINDOW = 128
"""good losses that a spike is measured against"""
ENOUGH = 8
"""good losses before anything is called a spike"""


def reason_to_skip(means: dict[str, float], gradient_norm: float, state: TrainState, config: TrainingConfig) -> str | None:
    """Why a step with this loss, count and gradient norm must not change the weights; None for a good step."""
    loss = means["loss"]
    if means["count"] == 0:
        return "no target of the batch counts: are its documents of one token, or all masked?"
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the gradient norm is {gradient_norm}"
    if config.check_for_spiky_loss and len(state.recent_losses) >= ENOUGH:
        usual = median(state.recent_losses)
        if loss > config.spiky_loss_factor * usual:
            return f"the loss {loss:.4f} is above {config.spiky_loss_factor:g} x {usual:.4f}, the median of recent ones"
    return None


def note_step(state: TrainState, loss: float, skipped: bool, config: TrainingConfig) -> None:
    """Counts the step that was just done or skipped."""
    state.iteration += 1
    state.lost_updates += skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if config.check_for_spiky_loss and not skipped:
        state.recent_losses = [*state.recent_losses, loss][-WINDOW:]
