"""Attention in plain matrix products, a tile of queries against the keys that one of them may see: the kernel of a CPU.

torch's own kernel for the CPU works head by head, at a third of the speed of its matrix product, and with a mask of documents it computes
all scores, masked or not. Here the queries of all heads that share a KV head are the rows of one product, keys
behind the tile or before its documents are left out, and the backward pass makes the probabilities again: q, k and v are all it keeps.

Both passes are operators of their own (`torch.library`), which a compiled block calls as they are.

Shapes: s = queries on this rank, S = keys of the whole sequence so far, b = micro-batch, g = query heads of a KV head, d = head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_llama3.parallel.torch_private import softmax_backward

if TYPE_CHECKING:
    from megatron_llama3.model.attention import AttentionMask

ROWS = 64
"""queries of a tile: fewer make the products too thin, more compute more scores that the mask hides"""


class Plan(NamedTuple):
    """All tiles in two tensors, since a compiled block would be compiled anew for other Python numbers."""

    borders: Tensor
    """int64 [tiles, 5], on the CPU: a tile's first and end row of this rank's queries, first and end key, and n of its `hidden`"""
    hidden: Tensor
    """bool, one tile's after another's, flat"""


class Tile(NamedTuple):
    queries: slice
    keys: slice
    hidden: Tensor
    """bool [b or 1, 1, 1, queries, n]: which of the tile's last n keys a query does not see; all see those before"""


def plan_tiled(mask: AttentionMask, batch: int) -> Plan:
    borders, hidden, row = [], [], 0
    for range_start, range_end in mask.query_ranges:
        for start in range(range_start, range_end, ROWS):
            end = min(start + ROWS, range_end)
            first_key, unseen = _unseen(mask, start, end)
            borders.append((row, row + end - start, first_key, end, unseen.shape[-1]))
            hidden.append(unseen.reshape(-1))
            row += end - start
    return Plan(torch.tensor(borders), torch.from_numpy(np.concatenate(hidden)).to(mask.device))


def _unseen(mask: AttentionMask, start: int, end: int) -> tuple[int, np.ndarray]:
    """(first key that one of the queries `start` to `end` sees, bool [b or 1, queries, n] of the last n keys before `end`)"""
    ids = np.zeros((1, end), np.int32) if mask.document_ids is None else mask.document_ids[:, :end]
    first = min(int(np.searchsorted(row, row[start])) for row in ids)  # documents are in order: the first query's begins first
    is_before = np.arange(first, end) <= np.arange(start, end)[:, None]
    unseen = ~(is_before & (ids[:, start:, None] == ids[:, None, first:]))
    seen_by_all = int(np.argmax(unseen.any(axis=(0, 1)))) if unseen.any() else unseen.shape[-1] - 1
    return first, unseen[:, :, seen_by_all:]


def tiles_of(borders: Tensor, hidden: Tensor) -> Iterator[Tile]:
    borders = borders.tolist()
    masked = hidden.numel() // sum((end - start) * n for start, end, _, _, n in borders)  # b, or 1 without documents
    at = 0
    for start, end, first_key, end_key, n in borders:
        size = masked * (end - start) * n
        yield Tile(slice(start, end), slice(first_key, end_key), hidden[at : at + size].view(masked, 1, 1, end - start, n))
        at += size


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """q [s, b, heads, d]; k, v [S, b, KV heads, d] -> [s, b, heads, d], computed in at least float32. Has no second derivative."""
    return _forward(q, k, v, plan.borders, plan.hidden)


@torch.library.custom_op("megatron_llama3::tiled_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, hidden: Tensor) -> Tensor:
    keys, values = _by_kv_head(k), _by_kv_head(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for tile in tiles_of(borders, hidden):
        weights = _weights(_rows(q, tile, k.shape[2]), keys, tile, q.shape[1])
        _write(out, tile, weights @ values[:, tile.keys])
    return out


@torch.library.custom_op("megatron_llama3::tiled_attention_backward", mutates_args=())
def _backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _by_kv_head(k), _by_kv_head(v)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for tile in tiles_of(borders, hidden):
        rows, grad_rows = _rows(q, tile, k.shape[2]), _rows(grad_out, tile, k.shape[2])
        weights = _weights(rows, keys, tile, q.shape[1])
        grad_values[:, tile.keys].baddbmm_(weights.transpose(1, 2), grad_rows)
        grad_weights = grad_rows @ values[:, tile.keys].transpose(1, 2)
        grad_scores = softmax_backward(grad_weights, weights).mul_(q.shape[-1] ** -0.5)
        _write(grad_q, tile, grad_scores @ keys[:, tile.keys])
        grad_keys[:, tile.keys].baddbmm_(grad_scores.transpose(1, 2), rows)
    return grad_q, _by_token(grad_keys, k), _by_token(grad_values, v)


@_forward.register_fake
def _(q, k, v, borders, hidden):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad_out, q, k, v, borders, hidden):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_out: Tensor):
    return *_backward(grad_out, *ctx.saved_tensors), None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _weights(rows: Tensor, keys: Tensor, tile: Tile, batch: int) -> Tensor:
    """Softmax of the tile's scores: [b * KV heads, g * queries, keys seen by some query]."""
    seen = keys[:, tile.keys]
    scores = torch.baddbmm(rows.new_zeros(1), rows, seen.transpose(1, 2), beta=0, alpha=rows.shape[-1] ** -0.5)
    queries, n = tile.hidden.shape[-2:]
    by_query = scores.view(batch, -1, rows.shape[1] // queries, queries, seen.shape[1])  # [b, KV heads, g, queries, keys]
    by_query[..., -n:].masked_fill_(tile.hidden, float("-inf"))
    return scores.softmax(-1)


def _by_kv_head(x: Tensor) -> Tensor:
    """[S, b, KV heads, d] -> [b * KV heads, S, d] in at least float32"""
    return x.to(torch.promote_types(x.dtype, torch.float32)).permute(1, 2, 0, 3).flatten(0, 1).contiguous()


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """The reverse of `_by_kv_head`, in the dtype and shape of `like`."""
    return x.unflatten(0, like.shape[1:3]).permute(2, 0, 1, 3).to(like.dtype).contiguous()


def _rows(x: Tensor, tile: Tile, kv_heads: int) -> Tensor:
    """The tile's part of [s, b, heads, d] as [b * KV heads, g * queries, d] in at least float32"""
    part = x[tile.queries].to(torch.promote_types(x.dtype, torch.float32))
    return part.unflatten(2, (kv_heads, -1)).permute(1, 2, 3, 0, 4).reshape(x.shape[1] * kv_heads, -1, x.shape[3])


def _write(out: Tensor, tile: Tile, rows: Tensor) -> None:
    """The reverse of `_rows`, into the tile's part of `out`."""
    _, batch, heads, head_dim = out.shape
    out[tile.queries] = rows.view(batch, heads, -1, head_dim).permute(2, 0, 1, 3)
