"""Every attention kernel against the textbook one, with documents, two ranges of queries (CP) and a batch."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_llama3.config.errors import UserError
from megatron_llama3.model import attention
from megatron_llama3.model.attention import KERNELS, AttentionMask, choose_kernel, plan_tiled, plan_varlen, reference_attention
from megatron_llama3.model.tiled_attention import tiles_of

SEQUENCE, BATCH, HEADS, KV_HEADS, DIM = 128, 2, 4, 2, 16
WHOLE = [(0, SEQUENCE)]
CP_RANGES = [(32, 64), (64, 96)]
OUTER_RANGES = [(0, 32), (96, 128)]


def documents() -> np.ndarray:
    """Borders that lie inside chunks, on a chunk's edge and directly after one another; the second row is one document and a rest."""
    borders = np.zeros((BATCH, SEQUENCE), np.int32)
    borders[0, [7, 8, 32, 50, 97]] = 1
    borders[1, 120] = 1
    return borders.cumsum(1).astype(np.int32)


def tensors(ranges, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries = sum(end - start for start, end in ranges)
    shapes = [(queries, BATCH, HEADS, DIM), (SEQUENCE, BATCH, KV_HEADS, DIM), (SEQUENCE, BATCH, KV_HEADS, DIM)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def attend(name: str, ranges, ids, dtype=torch.float64):
    q, k, v = tensors(ranges, dtype)
    kernel = KERNELS[name]
    out = kernel.attend(q, k, v, kernel.plan(AttentionMask(ranges, ids), BATCH))
    return out, (q, k, v)


def by_hand(ranges, ids) -> torch.Tensor:
    """Query by query, in plain loops."""
    q, k, v = (t.detach() for t in tensors(ranges))
    positions = [p for start, end in ranges for p in range(start, end)]
    out = torch.empty_like(q)
    for i, p in enumerate(positions):
        for b in range(BATCH):
            seen = [t for t in range(p + 1) if ids is None or ids[b, t] == ids[b, p]]
            for h in range(HEADS):
                scores = k[seen, b, h // (HEADS // KV_HEADS)] @ q[i, b, h] / DIM**0.5
                out[i, b, h] = scores.softmax(0) @ v[seen, b, h // (HEADS // KV_HEADS)]
    return out


@pytest.mark.parametrize("ids", [None, documents()], ids=["one document", "documents"])
@pytest.mark.parametrize("ranges", [WHOLE, CP_RANGES, OUTER_RANGES], ids=str)
def test_reference_is_what_the_definition_says(ranges, ids):
    out, _ = attend("reference", ranges, ids)
    torch.testing.assert_close(out, by_hand(ranges, ids))


@pytest.mark.parametrize("ids", [None, documents()], ids=["one document", "documents"])
@pytest.mark.parametrize("ranges", [WHOLE, CP_RANGES, OUTER_RANGES], ids=str)
@pytest.mark.parametrize("name", ["sdpa", "tiled"])
def test_forward_and_backward(name, ranges, ids):
    ours, inputs = attend(name, ranges, ids)
    theirs, reference_inputs = attend("reference", ranges, ids)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(ours.shape, dtype=ours.dtype)
    ours.backward(grad)
    theirs.backward(grad)
    for x, y in zip(inputs, reference_inputs):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("ids", [None, documents()], ids=["one document", "documents"])
def test_tiles_of_any_height_and_the_last_a_short_one(monkeypatch, ids):
    monkeypatch.setattr("megatron_llama3.model.tiled_attention.ROWS", 24)
    test_forward_and_backward("tiled", WHOLE, ids)


def test_tiles_leave_out_keys_that_no_query_of_them_sees():
    ids = np.repeat(np.arange(3, dtype=np.int32), [40, 72, 16])[None]
    tiles = list(tiles_of(*plan_tiled(AttentionMask(WHOLE, ids), 1)))
    assert [(tile.queries, tile.keys) for tile in tiles] == [(slice(0, 64), slice(0, 64)), (slice(64, 128), slice(40, 128))]
    assert [tile.hidden.shape[-1] for tile in tiles] == [64, 88]  # a later document's queries do not see the earlier one's keys
    without = tiles_of(*plan_tiled(AttentionMask(WHOLE), 1))
    assert [tile.hidden.shape[-1] for tile in without] == [63, 63]  # only the tile itself is masked


def test_tiles_compute_bfloat16_in_float32():
    ours, inputs = attend("tiled", WHOLE, documents(), torch.bfloat16)
    exact, _ = attend("reference", WHOLE, documents(), torch.bfloat16)  # the same inputs, in float32 inside
    torch.testing.assert_close(ours, exact, rtol=0, atol=2**-8)
    ours.sum().backward()
    assert {x.grad.dtype for x in inputs} == {torch.bfloat16}


@pytest.mark.parametrize("ids", [None, documents()], ids=["one document", "documents"])
@pytest.mark.parametrize("ranges", [WHOLE, CP_RANGES], ids=str)
def test_flex_forward(ranges, ids):
    with torch.no_grad():
        ours, _ = attend("flex", ranges, ids, torch.float32)
        theirs, _ = attend("reference", ranges, ids, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def plain_varlen(q, k, v, cumulative_queries, cumulative_keys, longest_query, longest_key, window_size, enable_gqa):
    """What torch's varlen_attn computes for window (-1, 0): in each stretch the last query sees the last key."""
    pieces = []
    borders = zip(*(pairwise(x.tolist()) for x in (cumulative_queries, cumulative_keys)), strict=True)
    for (a, e), (key_start, key_end) in borders:
        assert e - a <= longest_query
        assert key_end - key_start <= longest_key
        visible = torch.ones(e - a, key_end - key_start, dtype=torch.bool).tril(key_end - key_start - (e - a))
        pieces.append(reference_attention(q[a:e, None], k[key_start:key_end, None], v[key_start:key_end, None], visible[None, None])[:, 0])
    return torch.cat(pieces)


@pytest.mark.parametrize("ids", [None, documents()], ids=["one document", "documents"])
@pytest.mark.parametrize("ranges", [WHOLE, CP_RANGES, OUTER_RANGES], ids=str)
def test_varlen_is_told_the_visible_keys(monkeypatch, ranges, ids):
    """The kernel itself runs on a GPU; everything around it is checked here."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    ours, inputs = attend("varlen", ranges, ids)
    theirs, reference_inputs = attend("reference", ranges, ids)
    torch.testing.assert_close(ours, theirs)
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    for x, y in zip(inputs, reference_inputs):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize(
    ("lengths", "ranges", "longest"),
    [
        ([100, 90, 66], [(0, 256)], [(128, 128)]),
        ([128, 129, 43], [(0, 300)], [(256, 256)]),
        ([300], [(0, 300)], [(300, 300)]),  # no more than the range has
        ([1] * 256, [(0, 256)], [(1, 1)]),
        ([20, 236], [(0, 64), (192, 256)], [(64, 64), (64, 256)]),  # context parallelism: few queries, all keys of their document
    ],
)
def test_varlens_longest_stretches_are_the_batchs_own_in_powers_of_two(lengths, ranges, longest):
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
    plan = plan_varlen(AttentionMask(ranges, ids), 1)
    assert [(p.longest_queries, p.longest_keys) for p in plan] == longest


def test_varlen_and_flex_are_refused_on_a_cpu_before_training():
    for name in ("flex", "varlen"):
        with pytest.raises(UserError, match=f"--attention-kernel {name}"):
            choose_kernel(name, torch.device("cpu"), torch.float32)
    assert choose_kernel("auto", torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert choose_kernel("auto", torch.device("cpu"), torch.float32) == "tiled"
    assert choose_kernel("auto", torch.device("cuda"), torch.bfloat16) == "varlen"
    assert choose_kernel("auto", torch.device("cuda"), torch.float32) == "sdpa"


@pytest.mark.parametrize("is_cuda", [True, False])
def test_flex_is_compiled_on_a_gpu(monkeypatch, is_cuda):
    from torch.nn.attention.flex_attention import flex_attention

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append((function, how)) or "compiled")
    assert attention._flex.__wrapped__(is_cuda) == ("compiled" if is_cuda else flex_attention)
    assert compiled == is_cuda * [(flex_attention, {"dynamic": False})]


@pytest.mark.parametrize("name, device, dtype, chosen", [
    ("auto", "cpu", torch.bfloat16, "sdpa"), ("auto", "cuda", torch.bfloat16, "varlen"), ("auto", "cuda", torch.float32, "sdpa"),
    ("flex", "cuda", torch.float32, "flex"), ("varlen", "cuda", torch.bfloat16, "varlen"), ("reference", "cpu", torch.float64, "reference"),
])  # fmt: skip
def test_auto_is_the_fastest_kernel_that_runs(name, device, dtype, chosen):
    assert attention.choose_kernel(name, torch.device(device), dtype) == chosen
