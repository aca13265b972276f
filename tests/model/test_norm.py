"""The CPU's norm against torch's own, forward and backward, and what it keeps."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from megatron_llama3.model.norm import RMSNorm, fused_norm


def _draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, grad = torch.randn(2, 6, 3, 48, dtype=dtype, generator=generator)
    return 3 * x, 1 + torch.randn(48, dtype=dtype, generator=generator) / 5, grad


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=str)
def test_it_is_torchs(dtype, tolerance, is_frozen):
    x, weight, grad = _draw(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm = RMSNorm(weight.clone(), 1e-3)
    norm.weight.requires_grad_(not is_frozen)
    their_weight = weight.clone().requires_grad_()
    y, expected = norm(ours), F.rms_norm(theirs, (48,), their_weight, 1e-3)
    y.backward(grad)
    expected.backward(grad)
    pairs = [(y, expected), (ours.grad, theirs.grad)] + ([] if is_frozen else [(norm.weight.grad, their_weight.grad)])
    for found, wanted in pairs:
        assert (found - wanted).norm() <= tolerance * wanted.norm()
    assert not is_frozen or norm.weight.grad is None


def test_it_keeps_its_input_and_one_number_a_token():
    x, weight, _ = _draw(torch.bfloat16)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        RMSNorm(weight, 1e-5)(x.requires_grad_())
    assert sorted(kept) == sorted([x.numel(), x.numel() // 48, weight.numel()])


def test_bf16_is_rounded_once_at_the_end():
    x, weight, grad = _draw(torch.bfloat16)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(exact[0], (48,), exact[1], 1e-3)
    expected.backward(grad.double())
    ours, norm = x.requires_grad_(), RMSNorm(weight, 1e-3)
    y = norm(ours)
    y.backward(grad)
    for found, wanted in ((y, expected), (ours.grad, exact[0].grad), (norm.weight.grad, exact[1].grad)):
        assert found.dtype == torch.bfloat16
        assert (found != wanted.bfloat16()).float().mean() <= 0.01, "float32 may lie on the other side of a border now and then"


def test_nvidias_apex_is_taken_where_it_is_installed(monkeypatch):
    called = []
    functions = SimpleNamespace(fused_rms_norm_affine=lambda *arguments: called.append(arguments) or "normalized")
    for name, module in (("apex", None), ("apex.normalization", None), ("apex.normalization.fused_layer_norm", functions)):
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace(__path__=[]))
    name, normalize = fused_norm.__wrapped__()
    x, weight = torch.ones(2, 3), torch.ones(3)
    assert (name, normalize(x, weight, 1e-5)) == ("apex", "normalized")
    ((given, by, shape, eps),) = called
    assert given is x
    assert by is weight
    assert (shape, eps) == ((3,), 1e-5)
