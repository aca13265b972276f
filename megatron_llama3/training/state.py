"""How far a run has come: what a checkpoint keeps beside tensors."""

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    iteration: int = 0
    """steps done, skipped ones included: step i reads the i-th global batch, whatever became of the steps before it"""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    lost_updates: int = 0
    """steps whose update is not in the weights: skipped, or undone by a rollback"""
    lost_samples: int = 0
    """sequences of those steps"""
    skipped_in_a_row: int = 0
    """steps skipped since the last one that was not"""
    recent_losses: list[float] = field(default_factory=list)
    """of the last good steps, what a spike is measured against (--check-for-spiky-loss)"""
    rolled_back_to: list[int] = field(default_factory=list)
    """iterations of the checkpoints that the run went back to, each once at most"""
    useful_seconds: float = 0.0
    """spent in the steps that the weights are made of; those lost with a crash, skipped or rolled back are not in it"""

    @property
    def updates(self) -> int:
        """Optimizer updates that the weights are made of: what the learning rate and Adam count."""
        return self.iteration - self.lost_updates

    @property
    def update_samples(self) -> int:
        """Sequences that the weights are made of: what the learning rate counts under --train-samples."""
        return self.consumed_samples - self.lost_samples

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> "TrainState":
        """From a checkpoint's JSON; what an older one lacks is at its default."""
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})
