"""Grouped-query attention that never crosses a document border, for training under TP and CP and for cached decoding.

A kernel (`--attention-kernel`) is two functions: `plan` turns the mask of a micro-batch into the tensors the kernel needs, once for all
layers and outside what torch.compile sees; `attend` is the attention itself. `reference` is the plain one that tests compare with.

Shapes: s = queries on this rank, S = keys of the whole sequence so far, b = micro-batch, d = head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.norm import RMSNorm
from megatron_llama3.model.rope import apply_rotary
from megatron_llama3.model.sharding import layer_weights
from megatron_llama3.model.tiled_attention import plan_tiled, tiled_attention
from megatron_llama3.parallel.context_parallel import gather_keys_values
from megatron_llama3.parallel.linear import Recipe
from megatron_llama3.parallel.tensor_parallel import ParallelLinear, TensorParallel


@dataclass
class AttentionMask:
    """Who sees whom: a query sees itself and what came before it in its own document.

    `query_ranges` are the [start, end) pieces of the whole sequence that this rank's queries cover, in order. `document_ids` (int32
    [b, S], not decreasing along S) is None where each sequence is one document.
    """

    query_ranges: list[tuple[int, int]]
    document_ids: np.ndarray | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the same values; to a GPU from pinned memory, so that the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _dense_mask(mask: AttentionMask, start: int, end: int) -> Tensor:
    """Bool [b or 1, 1, end - start, end]: True where query `start + i` sees key j."""
    # Keys behind the range are not in the mask at all: no query of it sees them.
    queries, keys = torch.arange(start, end, device=mask.device), torch.arange(end, device=mask.device)
    visible = (keys <= queries.unsqueeze(1)).unsqueeze(0)
    if mask.document_ids is not None:
        ids = to_device(mask.document_ids, mask.device)
        visible = visible & (ids[:, start:end, None] == ids[:, None, :end])
    return visible.unsqueeze(1)


def _by_range(q: Tensor, plan: list[tuple]):
    """(queries of one range, its entry in the plan); an entry begins with the range's start and end."""
    return zip(q.split([end - start for start, end, *_ in plan]), plan, strict=True)


def _joined(pieces: list[Tensor]) -> Tensor:
    """The results of all ranges; that of a single one itself, since a copy would be kept for the backward pass beside it."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


# --- reference ---


def plan_reference(mask: AttentionMask, batch: int) -> Tensor:
    """Bool [b or 1, 1, s, S]."""
    longest = max(end for _, end in mask.query_ranges) if mask.document_ids is None else mask.document_ids.shape[1]
    return torch.cat([F.pad(_dense_mask(mask, a, e), (0, longest - e)) for a, e in mask.query_ranges], dim=2)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention as written in a textbook, in at least float32. q [s, b, heads, d]; k, v [S, b, KV heads, d] -> [s, b, heads, d]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[2] // k.shape[2]  # query heads that share a KV head
    visible = F.pad(visible, (0, k.shape[0] - visible.shape[-1]))
    k, v = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in (k, v))
    # scores and weights [b, heads, s, S]
    scores = torch.einsum("sbhd,tbhd->bhst", q.to(dtype), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v).to(q.dtype)


# --- torch's scaled_dot_product_attention ---


def plan_sdpa(mask: AttentionMask, batch: int) -> list[tuple[int, int, Tensor | None]]:
    """(start, end, dense mask) of each range; no mask where the causal flag alone says it."""
    return [(a, e, None if a == 0 and mask.document_ids is None else _dense_mask(mask, a, e)) for a, e in mask.query_ranges]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, plan: list[tuple[int, int, Tensor | None]]) -> Tensor:
    pieces = []
    k, v = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)  # [b, KV heads, S, d], torch's order of dimensions
    if q.is_cuda and any(dense is not None for _, _, dense in plan):  # CUDA's only kernel with both a mask and GQA holds every score
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[1], dim=1) for x in (k, v))
    for piece, (_, end, dense) in _by_range(q, plan):
        out = F.scaled_dot_product_attention(
            piece.permute(1, 2, 0, 3),
            k[:, :, :end],
            v[:, :, :end],
            attn_mask=dense,
            is_causal=dense is None,
            enable_gqa=k.shape[1] != q.shape[2],
        )
        pieces.append(out.permute(2, 0, 1, 3))
    return _joined(pieces)


# --- torch's flex_attention: blocks of keys that no query of a block sees are skipped ---


def plan_flex(mask: AttentionMask, batch: int) -> list[tuple[int, int, Any]]:
    """(start, end, block mask) of each range."""
    return [(a, e, _block_mask(mask, a, e, batch)) for a, e in mask.query_ranges]


def _block_mask(mask: AttentionMask, start: int, end: int, batch: int):
    from torch.nn.attention.flex_attention import create_block_mask

    ids = None if mask.document_ids is None else to_device(mask.document_ids, mask.device)

    def visible(b, h, query, key):
        before = key <= query + start
        return before if ids is None else before & (ids[b, query + start] == ids[b, key])

    return create_block_mask(visible, batch, None, end - start, end, device=mask.device)


@cache
def _flex(is_cuda: bool) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if is_cuda else flex_attention


def flex_attention(q: Tensor, k: Tensor, v: Tensor, plan: list[tuple[int, int, Any]]) -> Tensor:
    pieces = []
    k, v = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
    for piece, (_, end, blocks) in _by_range(q, plan):
        queries, keys, values = (x.contiguous() for x in (piece.permute(1, 2, 0, 3), k[:, :, :end], v[:, :, :end]))
        out = _flex(q.is_cuda)(queries, keys, values, block_mask=blocks, enable_gqa=True)
        pieces.append(out.permute(2, 0, 1, 3))
    return _joined(pieces)


# --- torch.nn.attention.varlen (FlashAttention on CUDA): each stretch of queries in one document against that document's keys ---


class Stretches(NamedTuple):
    start: int
    end: int
    key_rows: Tensor | None
    """int64: which rows of the keys [b * end, ...] some query sees; None where one range is the whole sequence. Under CP always rows, since
    they are copied, and a view would keep the keys of all ranks for the backward pass. A tensor, since a compiled block would be compiled
    anew for other Python numbers."""
    cumulative_queries: Tensor
    """int32 [stretches + 1]"""
    cumulative_keys: Tensor
    longest_queries: int
    """tokens of the longest stretch, rounded up to a power of two: a compiled block has a graph for each, and few of them"""
    longest_keys: int


def plan_varlen(mask: AttentionMask, batch: int) -> list[Stretches]:
    return [_stretches(mask, start, end, batch) for start, end in mask.query_ranges]


def _stretches(mask: AttentionMask, start: int, end: int, batch: int) -> Stretches:
    query_lengths, key_lengths, key_rows = [], [], []
    for row in range(batch):
        ids = np.zeros(end, np.int32) if mask.document_ids is None else mask.document_ids[row, :end]
        # A document's keys end where the range does, or where the document does: later ones no query of the range sees.
        borders = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), end]
        documents = [(a, e) for a, e in pairwise(borders) if e > start]
        key_rows.append(np.arange(row * end + documents[0][0], (row + 1) * end))
        query_lengths += [e - max(a, start) for a, e in documents]
        key_lengths += [e - a for a, e in documents]
    cumulative = [to_device(np.cumsum([0, *x], dtype=np.int32), mask.device) for x in (query_lengths, key_lengths)]
    rows = to_device(np.concatenate(key_rows), mask.device) if len(mask.query_ranges) > 1 else None
    return Stretches(start, end, rows, *cumulative, _rounded_up(max(query_lengths), end - start), _rounded_up(max(key_lengths), end))


def _rounded_up(length: int, limit: int) -> int:
    """The next power of two, or `limit` if that is smaller."""
    return min(1 << (length - 1).bit_length(), limit)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: list[Stretches]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    pieces = []
    for piece, (_, end, key_rows, *lengths) in _by_range(q, plan):
        # The kernel takes all sequences of the micro-batch as one: [b * tokens, heads, d], told apart by the cumulative lengths.
        keys, values = (x[:end].transpose(0, 1).flatten(0, 1) for x in (k, v))
        if key_rows is not None:
            keys, values = keys[key_rows], values[key_rows]
        queries = piece.transpose(0, 1).flatten(0, 1)
        # (-1, 0): each query sees any key before it and none behind, the last query of a stretch being its last key.
        out = varlen_attn(queries, keys, values, *lengths, window_size=(-1, 0), enable_gqa=True)
        pieces.append(out.unflatten(0, (q.shape[1], -1)).transpose(0, 1))
    return _joined(pieces)


class Kernel(NamedTuple):
    plan: Callable[[AttentionMask, int], Any]
    """(mask, micro-batch size) -> what `attend` takes as its last argument"""
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """q [s, b, heads, d], k and v [S, b, KV heads, d] -> [s, b, heads, d]"""


KERNELS = {
    "reference": Kernel(plan_reference, reference_attention),
    "sdpa": Kernel(plan_sdpa, sdpa_attention),
    "tiled": Kernel(plan_tiled, tiled_attention),
    "flex": Kernel(plan_flex, flex_attention),
    "varlen": Kernel(plan_varlen, varlen_attention),
}


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto` is FlashAttention for packed documents where it runs (bf16 on CUDA), `tiled` on a CPU in full precision, SDPA elsewhere."""
    if name in ("flex", "varlen") and device.type == "cpu":
        raise UserError(f"--attention-kernel {name} trains on a GPU only and this job runs on a CPU: use auto, sdpa, tiled or reference")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "varlen" if dtype == torch.bfloat16 else "sdpa"
    return "sdpa" if dtype == torch.bfloat16 else "tiled"


class Attention(nn.Module):
    """Grouped-query attention (paper, section 3.2). Where TP exceeds the KV heads, wk and wv are whole on every rank, which takes the rows
    of the one head that its queries use."""

    def __init__(self, weight: Callable[[str], Tensor], config: ModelConfig, tp: TensorParallel, cp_group, kernel: str):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (ParallelLinear(weight(f"attention.{w}.weight")) for w in ("wq", "wk", "wv", "wo"))
        self.tp, self.cp_group, self.head_dim = tp, cp_group, config.head_dim
        kv_split = layer_weights(config)["attention.wk.weight"].split_dim_at(tp.size)
        self.kv_rows = None
        if tp.size > 1 and kv_split is None:
            # A rank has consecutive query heads, and they all read one KV head: TP is a multiple of the KV heads here.
            head = tp.rank * config.num_query_groups // tp.size
            self.kv_rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        self.q_norm = self.k_norm = None
        if config.qk_layernorm:
            self.q_norm, self.k_norm = (RMSNorm(weight(f"attention.{w}.weight"), config.norm_epsilon) for w in ("q_norm", "k_norm"))
        self.core = KERNELS[kernel].attend

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], plan: Any, cache=None, recipe: Recipe | None = None) -> Tensor:
        """x [s, b, h] (this rank's part of s under sequence parallelism) -> the same shape. `cache` (inference) keeps keys and values.
        `recipe`: how x is made again in the backward pass, where it is not kept."""
        weights = [self.wq.local, self._kv_part(self.wk), self._kv_part(self.wv)]
        # q [s, b, heads/t, d]; k, v [s, b, KV heads/t (at least 1), d], s being whole again under sequence parallelism
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.tp.columns(x, weights, recipe))
        if self.q_norm is not None:  # before RoPE, as Qwen3 and Megatron-LM have it
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        k, v = gather_keys_values(k, v, self.cp_group)  # [S, b, KV heads/t, d]: queries stay cut over CP, keys do not
        mixed = self.core(q, k, v, plan)  # [s, b, heads/t, d]
        return self.tp.row(mixed.flatten(2), self.wo.local)

    def _kv_part(self, layer: ParallelLinear) -> Tensor:
        return layer.local if self.kv_rows is None else layer.local[self.kv_rows]
