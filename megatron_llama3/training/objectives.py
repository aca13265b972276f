"""What a step minimises: a sum over this rank's part of the batch, divided by a count over the whole of it.

An objective is a small object without state. The engine knows the order of things (pipeline, reduction, counting over ranks); the
objective knows what a model's output is worth. Another stage of training is another class here, not a branch in the engine.
"""

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_llama3.data.loader import Batch
from megatron_llama3.training.microbatch import Microbatch


class Objective(Protocol):
    terms: tuple[str, ...]
    """Names of the sums that are logged; the first is the loss."""

    def count(self, batch: Batch) -> int:
        """What this data-parallel rank's batch adds to the count that all sums are divided by."""

    def loss_weights(self, m: Microbatch) -> Tensor | None:
        """[s, b] where the loss is the sum of these times the log-probabilities (see model/loss.py), None where it is no such sum."""

    def __call__(self, output: Tensor, m: Microbatch, cp: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """What the last stage's `output` [s, b] of one micro-batch is worth: (the sum to be differentiated, the sums of `terms`
        [len(terms)], detached). Each rank of `cp` gives its part of both."""


class NextToken:
    """Pretraining (paper, section 3.4): the negative log-likelihood of each target that counts, in nats, in the mean over all of them."""

    terms = ("loss",)

    def count(self, batch: Batch) -> int:
        return int(batch.loss_mask.sum())

    def loss_weights(self, m: Microbatch) -> Tensor:
        return m.loss_mask.float()

    def __call__(self, log_probs: Tensor, m: Microbatch, cp: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        loss = -(log_probs * m.loss_mask).sum()  # a plain sum over tokens: context ranks have nothing to tell each other
        return loss, loss.detach().unsqueeze(0)
