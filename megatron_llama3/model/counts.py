"""Parameters and floating-point operations of a model, by its weight table. Imports no torch."""

import math

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.sharding import layer_weights, weight_table


def layer_parameter_count(model: ModelConfig, tp_size: int = 1) -> int:
    """Parameters of one block; with TP those on rank 0 (no other TP rank has more)."""
    return sum(math.prod(spec.local_shape(tp_size, 0)) for spec in layer_weights(model).values())


def parameter_count(model: ModelConfig) -> int:
    """Every parameter, a tied embedding counted once. Exact: 8,030,261,248 for 8B."""
    return sum(math.prod(spec.shape) for spec in weight_table(model).values())


def flops_per_token(model: ModelConfig, seq_length: int, causal: bool) -> float:
    """Floating-point operations to train on one token, forward and backward, recomputation not counted.

    Six for each weight of a matrix product (the output layer's included; norms and the embedding lookup are none), and twelve for each
    channel of Q, each layer and each key: QK^T and the product with V. Full attention has `seq_length` keys a query; causal attention
    (seq_length + 1) / 2 in the mean. A document mask leaves fewer still.
    """
    a_layer = sum(math.prod(spec.shape) for spec in layer_weights(model).values() if len(spec.shape) == 2)
    matrices = model.num_layers * a_layer + model.vocab_size * model.hidden_size
    keys = (seq_length + 1) / 2 if causal else seq_length
    return 6 * matrices + 12 * model.num_layers * model.num_attention_heads * model.head_dim * keys
