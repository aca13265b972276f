"""How far a run has come: what a checkpoint keeps beside tensors."""

from dataclasses import dataclass


@dataclass
class TrainState:
    iteration: int = 0
    """optimizer steps done"""
    consumed_samples: int = 0
    consumed_tokens: int = 0
