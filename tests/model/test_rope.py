"""Rotary frequencies, scaling and rotation against Meta's reference code."""

import math

import pytest
import torch

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.presets import preset
from megatron_llama3.model.rope import apply_rotary, rotary_frequencies, rotary_table


@pytest.mark.parametrize("name, kept, blended, divided", [("llama3.1-8b", 29, 6, 29), ("llama3.2-1b", 15, 3, 14)])
def test_how_many_frequencies_are_kept_blended_and_divided(name, kept, blended, divided):
    model = preset(name)
    scaled = rotary_frequencies(model)
    model.use_rope_scaling = False
    ratio = rotary_frequencies(model) / scaled
    counts = (torch.isclose(ratio, torch.tensor(1.0)), torch.isclose(ratio, torch.tensor(model.rope_scaling_factor)))
    assert [int(c.sum()) for c in counts] == [kept, divided]
    assert len(ratio) == kept + blended + divided


def test_long_wavelengths_are_those_divided():
    model = preset("llama3.1-8b")
    scaled = rotary_frequencies(model, torch.float64)
    model.use_rope_scaling = False
    plain = rotary_frequencies(model, torch.float64)
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotation_is_metas(scaling, head_dim):
    meta = pytest.importorskip("llama_models.llama3.model")
    model = ModelConfig(hidden_size=4 * head_dim, num_attention_heads=4, num_query_groups=2, use_rope_scaling=scaling)
    positions = 9000
    table = rotary_table(torch.arange(positions).unsqueeze(1), rotary_frequencies(model))
    theirs = meta.precompute_freqs_cis(head_dim, positions, model.rotary_base, scaling)
    # Angles reach 9,000 radians, of which float32 knows the last digits to 5e-4 only where frequencies differ in their last bit.
    torch.testing.assert_close(torch.complex(*table).squeeze(1).squeeze(1), theirs, rtol=0, atol=6e-4)
    q, k = torch.randn(2, 64, 4, head_dim), torch.randn(2, 64, 2, head_dim)
    theirs_q, theirs_k = meta.apply_rotary_emb(q, k, theirs[:64])
    short = tuple(t[:64] for t in table)
    for ours, reference in ((apply_rotary(q.transpose(0, 1), short), theirs_q), (apply_rotary(k.transpose(0, 1), short), theirs_k)):
        torch.testing.assert_close(ours.transpose(0, 1), reference, rtol=0, atol=2e-5)


def test_scores_depend_on_distance_only_and_norms_are_kept():
    model = ModelConfig(hidden_size=64, num_attention_heads=4, num_query_groups=2)
    frequencies = rotary_frequencies(model, torch.float64)
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def rotated(x, position):
        return apply_rotary(x, rotary_table(torch.tensor([[position]]), frequencies))

    near, far = ((rotated(q, p + 5) * rotated(k, p)).sum() for p in (0, 1000))
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(rotated(q, 77).norm(), q.norm())


def test_bf16_activations_are_rotated_in_float32():
    model = ModelConfig(hidden_size=64, num_attention_heads=4, num_query_groups=2)
    table = rotary_table(torch.arange(4000, 4008).unsqueeze(1), rotary_frequencies(model))
    x = torch.randn(8, 1, 2, 16).bfloat16()
    torch.testing.assert_close(apply_rotary(x, table), apply_rotary(x.float(), table).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_form_for_gpus_and_compiled_blocks_is_that_of_a_cpu(dtype, monkeypatch):
    x, grad = torch.randn(2, 7, 2, 3, 8, dtype=dtype)
    table = rotary_table(torch.arange(7)[:, None], torch.rand(4, dtype=torch.promote_types(dtype, torch.float32)))
    results = []
    for is_compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=is_compiling: value)
        y = apply_rotary(x.requires_grad_(), table)
        results.append((y, *torch.autograd.grad(y, x, grad)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
