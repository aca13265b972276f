"""Grouped-query attention that never crosses a document border, for training under TP and CP and for cached decoding.

Shapes: s = queries on this rank, S = keys of the whole sequence so far, b = micro-batch, d = head dimension. Kernels are chosen by name
(`--attention-kernel`) and have one interface; `reference` is the plain one that tests compare the others with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.rope import apply_rotary
from megatron_llama3.model.sharding import layer_weights
from megatron_llama3.parallel.context_parallel import gather_keys_values
from megatron_llama3.parallel.tensor_parallel import ParallelLinear, TensorParallel, local


@dataclass
class AttentionMask:
    """Who sees whom: a query sees itself and what came before it in its own document.

    `query_ranges` are the [start, end) pieces of the whole sequence that this rank's queries cover, in order. `document_ids` (int32
    [b, S], not decreasing along S) is None where each sequence is one document.
    """

    query_ranges: list[tuple[int, int]]
    document_ids: np.ndarray | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _made: dict = field(default_factory=dict, repr=False)

    def once(self, make: Callable, *key):
        """What a kernel derives from the mask, made by the first layer and kept for the others."""
        if key not in self._made:
            self._made[key] = make(self, *key[1:])
        return self._made[key]


def _dense_mask(mask: AttentionMask, start: int, end: int) -> Tensor:
    """Bool [b or 1, 1, end - start, end]: True where query `start + i` sees key j."""
    queries, keys = torch.arange(start, end, device=mask.device), torch.arange(end, device=mask.device)
    visible = (keys <= queries.unsqueeze(1)).unsqueeze(0)
    if mask.document_ids is not None:
        ids = torch.from_numpy(mask.document_ids).to(mask.device)
        visible = visible & (ids[:, start:end, None] == ids[:, None, :end])
    return visible.unsqueeze(1)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Softmax attention as written in a textbook, in at least float32. q [s, b, heads, d]; k, v [S, b, KV heads, d] -> [s, b, heads, d]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[2] // k.shape[2]
    visible = torch.cat([F.pad(_dense_mask(mask, a, e), (0, k.shape[0] - e)) for a, e in mask.query_ranges], dim=2)
    k, v = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q.to(dtype), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """torch's scaled_dot_product_attention, a dense mask only where the causal flag alone does not say it."""
    pieces = []
    k, v = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
    for piece, (start, end) in _by_range(q, mask):
        causal = start == 0 and mask.document_ids is None
        dense = None if causal else mask.once(_dense_mask, "dense", start, end)
        out = F.scaled_dot_product_attention(
            piece.permute(1, 2, 0, 3), k[:, :, :end], v[:, :, :end], attn_mask=dense, is_causal=causal, enable_gqa=k.shape[1] != q.shape[2]
        )
        pieces.append(out.permute(2, 0, 1, 3))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """torch's flex_attention: blocks of keys that no query of a block sees are skipped. Compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    run = _compiled(flex) if q.is_cuda else flex
    pieces = []
    k, v = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
    for piece, (start, end) in _by_range(q, mask):
        blocks = mask.once(_block_mask, "flex", start, end, q.shape[1])
        query = piece.permute(1, 2, 0, 3).contiguous()
        out = run(query, k[:, :, :end].contiguous(), v[:, :, :end].contiguous(), block_mask=blocks, enable_gqa=True)
        pieces.append(out.permute(2, 0, 1, 3))
    return torch.cat(pieces)


def _block_mask(mask: AttentionMask, start: int, end: int, batch: int):
    from torch.nn.attention.flex_attention import create_block_mask

    ids = None if mask.document_ids is None else torch.from_numpy(mask.document_ids).to(mask.device)

    def visible(b, h, query, key):
        before = key <= query + start
        return before if ids is None else before & (ids[b, query + start] == ids[b, key])

    return create_block_mask(visible, batch, None, end - start, end, device=mask.device)


_COMPILED: dict[Callable, Callable] = {}


def _compiled(function: Callable) -> Callable:
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function, dynamic=False)
    return _COMPILED[function]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """torch.nn.attention.varlen (FlashAttention on CUDA): each stretch of queries in one document against that document's keys."""
    from torch.nn.attention.varlen import varlen_attn

    pieces = []
    for piece, (start, end) in _by_range(q, mask):
        first_keys, cu_q, cu_k, max_q, max_k = mask.once(_stretches, "varlen", start, end, q.shape[1])
        keys, values = (torch.cat([x[first:end, row] for row, first in enumerate(first_keys)]) for x in (k, v))
        flat = piece.transpose(0, 1).flatten(0, 1)
        out = varlen_attn(flat, keys, values, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), enable_gqa=True)
        pieces.append(out.unflatten(0, (q.shape[1], -1)).transpose(0, 1))
    return torch.cat(pieces)


def _stretches(mask: AttentionMask, start: int, end: int, batch: int):
    """The first key of each row, cumulative query and key lengths (int32, on the device) and the longest of each."""
    query_lengths, key_lengths, first_keys = [], [], []
    for row in range(batch):
        ids = np.zeros(end, np.int32) if mask.document_ids is None else mask.document_ids[row, :end]
        borders = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), end]
        documents = [(a, e) for a, e in pairwise(borders) if e > start]
        first_keys.append(documents[0][0])
        query_lengths += [e - max(a, start) for a, e in documents]
        key_lengths += [e - a for a, e in documents]
    cumulative = [torch.tensor(np.cumsum([0, *x]), dtype=torch.int32, device=mask.device) for x in (query_lengths, key_lengths)]
    return first_keys, *cumulative, max(query_lengths), max(key_lengths)


def _by_range(q: Tensor, mask: AttentionMask):
    lengths = [end - start for start, end in mask.query_ranges]
    return zip(q.split(lengths), mask.query_ranges, strict=True)


KERNELS = {"reference": reference_attention, "sdpa": sdpa_attention, "flex": flex_attention, "varlen": varlen_attention}


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto` is FlashAttention for packed documents where it runs (bf16 on CUDA), SDPA elsewhere."""
    if name in ("flex", "varlen") and device.type == "cpu":
        raise UserError(f"--attention-kernel {name} trains on a GPU only and this job runs on a CPU: use auto, sdpa or reference")
    if name != "auto":
        return name
    return "varlen" if device.type == "cuda" and dtype == torch.bfloat16 else "sdpa"


class Attention(nn.Module):
    """Grouped-query attention (paper, section 3.2). Where TP exceeds the KV heads, wk and wv are whole on every rank, which takes the rows
    of the one head that its queries use."""

    def __init__(
        self, weight: Callable[[str], Tensor], config: ModelConfig, tp: TensorParallel, cp_group, kernel: str, recompute: bool = False
    ):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (ParallelLinear(weight(f"attention.{w}.weight"), tp) for w in ("wq", "wk", "wv", "wo"))
        self.tp, self.cp_group, self.head_dim = tp, cp_group, config.head_dim
        kv_split = layer_weights(config)["attention.wk.weight"].split_dim_at(tp.size)
        self.kv_rows = None
        if tp.size > 1 and kv_split is None:
            head = tp.rank * config.num_query_groups // tp.size
            self.kv_rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        self.core = KERNELS[kernel]
        if recompute:
            self.core = partial(checkpoint, self.core, use_reentrant=False, preserve_rng_state=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, cache=None) -> Tensor:
        """x [s, b, h] (this rank's part of s under sequence parallelism) -> the same shape. `cache` (inference) keeps keys and values."""
        x = self.tp.gather_input(x)
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))
        k, v = (self._kv(layer, x).unflatten(-1, (-1, self.head_dim)) for layer in (self.wk, self.wv))
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        k, v = gather_keys_values(k, v, self.cp_group)
        return self.tp.reduce_output(self.wo(self.core(q, k, v, mask).flatten(2)))

    def _kv(self, layer: ParallelLinear, x: Tensor) -> Tensor:
        if self.kv_rows is None:
            return layer(x)
        return self.tp.linear(x, local(layer.weight)[self.kv_rows])
