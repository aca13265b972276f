"""The next token from its logits: the most likely one, or a draw at a temperature from the most likely ones (top-p)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the most likely token; `top_p` 1 leaves out none."""

    temperature: float = 0.6
    top_p: float = 0.9
    seed: int = 1234

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature}: must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1")


GREEDY = Sampling(temperature=0.0)


def nucleus(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens that together reach probability `top_p` (Holtzman et al., 2020).

    logits [b, V] -> (probabilities, token ids), both [b, V] by falling probability; 0 for the tokens left out, and 1 in sum for the rest.
    """
    probabilities, tokens = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0)
    kept[:, 0] = probabilities[:, 0]  # rounding must not leave a row empty
    return kept / kept.sum(-1, keepdim=True), tokens


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits [b, V] -> token ids int64 [b]. `generator` is a CPU one and gives one number a row, whatever the device or `top_p`."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = nucleus(logits, sampling.temperature, sampling.top_p)
    drawn = torch.rand(logits.shape[0], 1, dtype=torch.float64, generator=generator).to(logits.device)
    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, last)).squeeze(1)
