"""A block's gradients under every form of tensor parallelism, against a block as a textbook writes it, by plain autograd on one process,
and what the block keeps for its backward pass."""

import math

import pytest
import torch
from torch import Tensor

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.model.attention import AttentionMask
from megatron_llama3.model.llama import BuildOptions, Llama, ModelInputs
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.pipeline_parallel import DeferredWeightGradients
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.planning.local_ranks import run_ranks

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LENGTH, BATCH = 4, 2, 6, 20, 28, 12, 2
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=HEADS,
    num_query_groups=KV_HEADS,
    kv_channels=HEAD_DIM,
    vocab_size=32,
    rotary_base=500,
)
NAMES = {
    "attention_norm.weight": (HIDDEN,),
    "attention.wq.weight": (HEADS * HEAD_DIM, HIDDEN),
    "attention.wk.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attention.wv.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attention.wo.weight": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_norm.weight": (HIDDEN,),
    "feed_forward.w1.weight": (FFN, HIDDEN),
    "feed_forward.w2.weight": (HIDDEN, FFN),
    "feed_forward.w3.weight": (FFN, HIDDEN),
}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in NAMES.items()}
    return {name: w / math.sqrt(w.shape[-1]) if w.ndim == 2 else 1 + w / 10 for name, w in draw.items()}


def activations() -> tuple[Tensor, Tensor]:
    """The block's input and the gradient of its output, [s, b, h]."""
    generator = torch.Generator().manual_seed(4)
    x, grad = torch.randn(2, LENGTH, BATCH, HIDDEN, dtype=torch.float64, generator=generator)
    return x, grad


# --- the textbook ---


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + MODEL.norm_epsilon) * weight


def rotate(x: Tensor) -> Tensor:
    """x [s, b, heads, d]: pairs (2i, 2i + 1) as complex numbers, turned by position / base^(2i/d)."""
    angles = torch.outer(torch.arange(LENGTH).double(), 500 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return torch.view_as_real(turned).flatten(-2)


def textbook_block(w: dict[str, Tensor], x: Tensor) -> Tensor:
    n = rms_norm(x, w["attention_norm.weight"])
    q, k, v = ((n @ w[f"attention.{name}.weight"].T).unflatten(-1, (-1, HEAD_DIM)) for name in ("wq", "wk", "wv"))
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=2) for y in (rotate(k), v))
    scores = torch.einsum("sbhd,tbhd->bhst", rotate(q), k) / math.sqrt(HEAD_DIM)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    attended = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v).flatten(2)
    h = x + attended @ w["attention.wo.weight"].T
    n = rms_norm(h, w["ffn_norm.weight"])
    gate, up = (n @ w[f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
    return h + (gate / (1 + torch.exp(-gate)) * up) @ w["feed_forward.w2.weight"].T


def expected() -> dict[str, Tensor]:
    w = {name: weight.requires_grad_() for name, weight in weights().items()}
    x, grad = activations()
    y = textbook_block(w, x.requires_grad_())
    y.backward(grad)
    return {"output": y.detach(), "input": x.grad, **{name: weight.grad for name, weight in w.items()}}


# --- ours ---


def local_slice(x: Tensor, dim: int | None, tp: TensorParallel) -> Tensor:
    return x if dim is None else x.chunk(tp.size, dim)[tp.rank]


def build(tp: TensorParallel, cp_group, recompute: tuple[str, ...]) -> Llama:
    options = BuildOptions(torch.float64, torch.float64, recompute_modules=recompute)
    chunk = Llama(MODEL, tp, cp_group, has_embedding=False, has_output=False, options=options)
    for name, parameter in chunk.layers["0"].named_parameters():
        dim = chunk.specs[f"layers.0.{name}"].split_dim_at(tp.size)
        parameter.data = local_slice(weights()[name], dim, tp).clone()
    return chunk


def whole(x: Tensor | None, dim: int | None, tp: TensorParallel) -> Tensor | None:
    """The ranks' parts put together; a gradient that every rank has a part of is summed."""
    if x is None or tp.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(tp.size)]
    torch.distributed.all_gather(parts, x.contiguous(), group=tp.group)
    return torch.cat(parts, dim) if dim is not None else sum(parts)


def _ours(parallel: ParallelConfig, frozen: tuple[str, ...], is_deferred: bool, recompute: tuple[str, ...]) -> dict[str, Tensor]:
    groups = initialize_groups(parallel)
    deferred = DeferredWeightGradients() if is_deferred else None
    tp = TensorParallel(groups.tp, parallel.sequence_parallel, deferred=deferred)
    chunk = build(tp, groups.cp, recompute)
    for name, parameter in chunk.layers["0"].named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    sequence = 0 if tp.sequence_parallel else None
    x, grad = (local_slice(t, sequence, tp).clone() for t in activations())
    inputs = ModelInputs(torch.zeros(LENGTH, BATCH, dtype=torch.int64), torch.arange(LENGTH)[:, None], AttentionMask([(0, LENGTH)]))
    y = chunk(x.requires_grad_(), inputs)
    y.backward(grad)
    if deferred is not None:
        assert chunk.layers["0"].feed_forward.w1.weight.grad is None
        deferred.run(deferred.take())
    result = {"output": y.detach(), "input": x.grad}
    result = {name: t if sequence is None else whole(t, sequence, tp) for name, t in result.items()}
    for name, parameter in chunk.layers["0"].named_parameters():
        spec = chunk.specs[f"layers.0.{name}"]
        dim, is_partial = spec.split_dim_at(tp.size), spec.gradient_is_partial(tp.size, tp.sequence_parallel)
        result[name] = whole(parameter.grad, dim, tp) if dim is not None or is_partial else parameter.grad
    return result


LAYOUTS = {
    "one process": {},
    "tp 2": {"tensor_model_parallel_size": 2, "world_size": 2},
    "tp 2, sp": {"tensor_model_parallel_size": 2, "world_size": 2, "sequence_parallel": True},
    "tp 4 of 2 KV heads": {"tensor_model_parallel_size": 4, "world_size": 4},
    "tp 4 of 2 KV heads, sp": {"tensor_model_parallel_size": 4, "world_size": 4, "sequence_parallel": True},
}
CASES = {  # (frozen weights, zero bubble's weight half, --recompute-modules)
    "at once": ((), False, ()),
    "weights later": ((), True, ()),
    "some frozen": (("wq.weight", "w1.weight", "w3.weight", "w2.weight", "ffn_norm.weight"), False, ()),
    "norms made again": ((), False, ("layernorm",)),
    "feed-forward made again": ((), False, ("mlp",)),
    "both, weights later": ((), True, ("layernorm", "mlp")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_textbook_s(layout, case):
    parallel, (frozen, *rest) = ParallelConfig(**LAYOUTS[layout]), CASES[case]
    for result in run_ranks(parallel.world_size, _ours, parallel, frozen, *rest):
        for name, value in expected().items():
            if name.endswith(frozen or "-"):
                assert result[name] is None
            else:
                torch.testing.assert_close(result[name], value, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
