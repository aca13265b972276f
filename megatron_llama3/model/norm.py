"""RMSNorm (paper, section 3.2): x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llama3.parallel.linear import Recipe
from megatron_llama3.parallel.tensor_parallel import local_part


@lru_cache(maxsize=1)
def fused_norm() -> tuple[str, Callable[[Tensor, Tensor, float], Tensor]]:
    """The RMSNorm function in use and its name: NVIDIA apex's where it is installed (PyPI's `apex` is another package), else torch's."""
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError:
        return "torch", lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)
    return "apex", lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps)


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.eps = eps
        self.normalize = fused_norm()[1]  # found here and not in forward, where torch.compile would trace the import

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] with a weight [n]."""
        return self.normalize(x, local_part(self.weight), self.eps)

    def recipe(self, x: Tensor) -> Recipe:
        """How `self(x)` is made again, of tensors that its own backward pass needs anyway."""
        return Recipe(partial(self.normalize, eps=self.eps), (x.detach(), local_part(self.weight).detach()))
