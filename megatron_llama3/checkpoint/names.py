"""Weight names: ours (Meta's) against Hugging Face's and GGUF's, and the row order in which rotary embeddings want wq and wk.

Meta rotates adjacent pairs (2i, 2i+1) of a head, Hugging Face halves (i, i + head_dim/2): the same model stores the rows of wq and wk
in another order.
"""

import re
from collections.abc import Mapping

import torch

from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, reorder_rows
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.sharding import layer_weights, weight_table

_OUTER_TO_HF = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_LAYER_TO_HF = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_OUTER_TO_GGUF = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "output.weight": "output.weight"}
_LAYER_TO_GGUF = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}


def to_hf_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    layer, part = _layer_part(name)
    return _OUTER_TO_HF[name] if layer is None else f"model.layers.{layer}.{_LAYER_TO_HF[part]}.weight"


def to_gguf_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `blk.3.attn_q.weight`."""
    layer, part = _layer_part(name)
    return _OUTER_TO_GGUF[name] if layer is None else f"blk.{layer}.{_LAYER_TO_GGUF[part]}.weight"


def rope_rows_to_halves(heads: int, head_dim: int) -> torch.Tensor:
    """int64 [heads*head_dim]: row i of the rotate-half form is row result[i] of the adjacent-pair form."""
    return torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def rope_rows_to_pairs(heads: int, head_dim: int) -> torch.Tensor:
    """int64 [heads*head_dim]: row i of the adjacent-pair form (ours) is row result[i] of the rotate-half form."""
    return torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def to_halves(name: str, tensor: LazyTensor, model: ModelConfig) -> LazyTensor:
    """One of our weights in Hugging Face's row order, which is another for those that RoPE turns (wq, wk)."""
    heads = _rotated_heads(name, model)
    return tensor if heads is None else reorder_rows(tensor, rope_rows_to_halves(heads, model.head_dim))


def to_pairs(name: str, tensor: LazyTensor, model: ModelConfig) -> LazyTensor:
    """One of Hugging Face's weights in our row order, which is another for those that RoPE turns (wq, wk)."""
    heads = _rotated_heads(name, model)
    return tensor if heads is None else reorder_rows(tensor, rope_rows_to_pairs(heads, model.head_dim))


def weight_shapes(model: ModelConfig, found: int, where: object) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every weight that the config asks for, in order. Raises UserError where the model has more layers than the files
    hold weights (`found`): a table of ten million layers fills the memory before it could be compared."""
    if model.num_layers > found:
        raise UserError(f"{where}: the config asks for {model.num_layers} layers, {found} weights are there")
    return {name: spec.shape for name, spec in weight_table(model).items()}


def check_weights(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Raises UserError for a weight missing, left over, or of another shape than the config says. Names are those of the files."""
    for name, shape in expected.items():
        if name not in found:
            counts = f"{len(found)} weights are there, the config asks for {len(expected)}"
            raise UserError(f"{where}: weight {name} {list(shape)} is missing ({counts})")
        if tuple(found[name]) != shape:
            raise UserError(f"{where}: weight {name} has shape {list(found[name])}, the config asks for {list(shape)}")
    extra = sorted(set(found) - set(expected))
    if extra:
        raise UserError(f"{where}: {len(extra)} weights that the config has no place for, {extra[0]} {list(found[extra[0]])} among them")


def _layer_part(name: str) -> tuple[str | None, str]:
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name)
    if match is None:
        raise UserError(f"{name}: not a weight of a Llama 3 model")
    return match[1], match[2]


def _rotated_heads(name: str, model: ModelConfig) -> int | None:
    """How many heads the rows of a weight that RoPE turns make up; None for any other weight."""
    layer, part = _layer_part(name)
    spec = None if layer is None else layer_weights(model).get(f"{part}.weight")
    return spec.shape[0] // model.head_dim if spec and spec.is_rotated else None
