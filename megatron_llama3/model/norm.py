"""RMSNorm (paper, section 3.2): x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megatron_llama3.parallel.linear import Recipe
from megatron_llama3.parallel.tensor_parallel import local_part


@lru_cache(maxsize=1)
def fused_norm() -> tuple[str, Callable[[Tensor, Tensor, float], Tensor]]:
    """The RMSNorm function in use and its name: NVIDIA apex's where it is installed (PyPI's `apex` is another package), else torch's."""
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError:
        return "torch", _torch_norm
    return "apex", lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps)


def _torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _CpuNorm.apply(x, weight, eps)


class _CpuNorm(Function):
    """As CUDA's kernel, it keeps its input and 1 / rms: torch's own norm takes itself apart on a CPU and keeps the normalized x too."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        whole = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(whole, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (whole * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        normalized, weighted = x.to(inverse_rms.dtype) * inverse_rms, grad.to(inverse_rms.dtype) * weight
        weight_grad = (normalized * grad).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        along = (weighted * normalized).mean(-1, keepdim=True)
        return ((weighted - normalized * along) * inverse_rms).to(x.dtype), weight_grad, None


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
