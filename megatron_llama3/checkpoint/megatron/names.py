"""Weight names: ours against Megatron-LM's, whose weights are fused, and stored as one tensor for all layers or as one for each.

decoder.layers.self_attention.linear_qkv.weight        [L, (nh + 2 * nkv) * hd, h]     stacked, Megatron-LM's default
decoder.layers.17.self_attention.linear_qkv.weight     [(nh + 2 * nkv) * hd, h]        a key for each layer
"""

import re

from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, concatenate, narrow
from megatron_llama3.checkpoint.names import to_halves, to_pairs
from megatron_llama3.config.model import ModelConfig

OUTER = {
    "tok_embeddings.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "output.weight": "output_layer.weight",
}
_SAME = {
    "attention_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attention.q_norm.weight": "self_attention.q_layernorm.weight",
    "attention.k_norm.weight": "self_attention.k_layernorm.weight",
    "attention.wo.weight": "self_attention.linear_proj.weight",
    "ffn_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "feed_forward.w2.weight": "mlp.linear_fc2.weight",
}
QKV, FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_GATE, _UP = f"{FC1}_w", f"{FC1}_v"
# What other versions call the same: layers of Megatron-LM's own instead of Transformer Engine's, and gate and up under keys of their own.
_ALIASES = {"input_layernorm.weight": _SAME["attention_norm.weight"], "pre_mlp_layernorm.weight": _SAME["ffn_norm.weight"]}
LAYER_KEY = re.compile(r"decoder\.layers\.(?:(\d{1,6})\.)?(.+)")


def split_layer(layer: dict[str, LazyTensor], model: ModelConfig) -> dict[str, LazyTensor]:
    """One layer's tensors by Megatron-LM's names -> by ours, in our row order; what has no name of ours keeps its own."""
    layer = {_ALIASES.get(key, key): tensor for key, tensor in layer.items()}
    if _GATE in layer and _UP in layer:
        layer[FC1] = concatenate([layer.pop(_GATE), layer.pop(_UP)], 0)
    ours = {name: layer.pop(key) for name, key in _SAME.items() if key in layer}
    if QKV in layer and layer[QKV].shape[0] == sum(_group_rows(model)) * model.num_query_groups:
        ours |= _split_qkv(layer.pop(QKV), model)
    if FC1 in layer and layer[FC1].shape[0] == 2 * model.ffn_hidden_size:
        fused = layer.pop(FC1)
        ours["feed_forward.w1.weight"] = narrow(fused, 0, 0, model.ffn_hidden_size)
        ours["feed_forward.w3.weight"] = narrow(fused, 0, model.ffn_hidden_size, model.ffn_hidden_size)
    return {name: to_pairs(f"layers.0.{name}", tensor, model) for name, tensor in ours.items()} | layer


def fuse_layer(layer: dict[str, LazyTensor], model: ModelConfig) -> dict[str, LazyTensor]:
    """The reverse of `split_layer`."""
    layer = {name: to_halves(f"layers.0.{name}", tensor, model) for name, tensor in layer.items()}
    fused = {key: layer[name] for name, key in _SAME.items() if name in layer}
    fused[QKV] = _fuse_qkv([layer[f"attention.{name}.weight"] for name in ("wq", "wk", "wv")], model)
    fused[FC1] = concatenate([layer["feed_forward.w1.weight"], layer["feed_forward.w3.weight"]], 0)
    return fused


def _group_rows(model: ModelConfig) -> tuple[int, int, int]:
    """Rows of queries, keys and values in one query group of the fused weight."""
    return model.num_attention_heads // model.num_query_groups * model.head_dim, model.head_dim, model.head_dim


def _split_qkv(fused: LazyTensor, model: ModelConfig) -> dict[str, LazyTensor]:
    rows, start, parts = _group_rows(model), 0, {}
    for name, count in zip(("wq", "wk", "wv"), rows, strict=True):
        groups = [narrow(fused, 0, group * sum(rows) + start, count) for group in range(model.num_query_groups)]
        parts[f"attention.{name}.weight"] = concatenate(groups, 0)
        start += count
    return parts


def _fuse_qkv(parts: list[LazyTensor], model: ModelConfig) -> LazyTensor:
    rows = _group_rows(model)
    groups = range(model.num_query_groups)
    return concatenate([narrow(part, 0, group * n, n) for group in groups for part, n in zip(parts, rows, strict=True)], 0)
