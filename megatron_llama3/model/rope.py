"""Rotary positions (theta 500,000) and the frequency scaling of Llama 3.1 that stretches 8K of context to 128K.

Rotation is over adjacent pairs (2i, 2i+1), Meta's layout; Hugging Face's layout rotates halves, which conversion permutes.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_llama3.config.model import ModelConfig


def rotary_frequencies(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Angle per position of each pair, [head_dim / 2], scaled where the config says so."""
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=dtype) / dim
    frequencies = 1.0 / (config.rotary_base**exponents)
    return _scale_frequencies(frequencies, config) if config.use_rope_scaling else frequencies


def _scale_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    context = config.rope_scaling_original_max_position_embeddings
    low, high = config.rope_scaling_low_freq_factor, config.rope_scaling_high_freq_factor
    wavelength = 2 * math.pi / frequencies
    kept_share = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept_share) * frequencies / config.rope_scaling_factor + kept_share * frequencies


def rotary_table(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """position_ids [s, b] or [s, 1] -> cosine and sine, each [s, b, 1, head_dim / 2] in the frequencies' dtype."""
    angles = position_ids.to(frequencies.dtype).unsqueeze(-1) * frequencies
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [s, b, heads, head_dim], rotated in the table's dtype and returned in its own."""
    cos, sin = table
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # torch.compile makes one pass of the lines below itself
        return _RotateInOnePass.apply(x, cos, sin)
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class _RotateInOnePass(Function):
    """A product of complex numbers; the gradient turns back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _times(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _times(grad, cos, -sin), None, None


def _times(x: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.to(real.dtype).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(real, imaginary)).flatten(-2).to(x.dtype)
