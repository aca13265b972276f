"""What a Llama 3 model is: sizes, RoPE scaling, and the counts that follow by formula (paper, section 3.2). presets.py has named sizes."""

from dataclasses import dataclass

from megatron_llama3.config.fields import option


@dataclass(kw_only=True)
class ModelConfig:
    """The architecture. `num_query_groups` is Megatron's name for the number of key/value heads, `kv_channels` for the head dimension."""

    num_layers: int = option(4, "Transformer layers.")
    hidden_size: int = option(256, "Width of the residual stream.")
    ffn_hidden_size: int = option(768, "Inner width of the SwiGLU feed-forward.")
    num_attention_heads: int = option(8, "Query heads.")
    num_query_groups: int = option(4, "Key/value heads (grouped-query attention).")
    kv_channels: int | None = option(None, "Width of one head; default hidden-size / num-attention-heads.")
    vocab_size: int = option(8192, "Rows of the embedding; the checkpoint holds exactly these, without padding.")
    max_position_embeddings: int = option(8192, "Longest sequence the model is meant for.")
    norm_epsilon: float = option(1e-5, "RMSNorm epsilon.")
    rotary_base: int = option(500_000, "RoPE theta.")
    use_rope_scaling: bool = option(False, "Llama 3.1's scaling of RoPE frequencies for 128K contexts.")
    rope_scaling_factor: float = option(8.0, "RoPE scaling: low frequencies are divided by this.")
    rope_scaling_low_freq_factor: float = option(1.0, "RoPE scaling: wavelengths above original length / this are fully scaled.")
    rope_scaling_high_freq_factor: float = option(4.0, "RoPE scaling: wavelengths below original length / this are left alone.")
    rope_scaling_original_max_position_embeddings: int = option(8192, "RoPE scaling: context length before scaling.")
    untie_embeddings_and_output_weights: bool = option(True, "Separate input and output embeddings (all sizes but 1B and 3B).")
    init_method_std: float = option(0.02, "Standard deviation of initial weights.")

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


def layer_parameter_count(model: ModelConfig) -> int:
    """Parameters of one block: wq, wk, wv, wo, w1, w2, w3 and its two norms."""
    width, heads_width = model.hidden_size, model.num_attention_heads * model.head_dim
    kv_width = model.num_query_groups * model.head_dim
    return 2 * width * heads_width + 2 * width * kv_width + 3 * width * model.ffn_hidden_size + 2 * width


def parameter_count(model: ModelConfig) -> int:
    """Every parameter, a tied embedding counted once. Exact: 8,030,261,248 for 8B."""
    embeddings = model.vocab_size * model.hidden_size * (1 + model.untie_embeddings_and_output_weights)
    return model.num_layers * layer_parameter_count(model) + embeddings + model.hidden_size


def flops_per_token(model: ModelConfig, seq_length: int, causal: bool) -> float:
    """Floating-point operations to train on one token, forward and backward, recomputation not counted.

    Six for each weight of a matrix product (the output layer's included; norms and the embedding lookup are none), and twelve for each
    channel of Q, each layer and each key: QK^T and the product with V. Full attention has `seq_length` keys a query; causal attention
    (seq_length + 1) / 2 in the mean. A document mask leaves fewer still.
    """
    matrices = model.num_layers * (layer_parameter_count(model) - 2 * model.hidden_size) + model.vocab_size * model.hidden_size
    keys = (seq_length + 1) / 2 if causal else seq_length
    return 6 * matrices + 12 * model.num_layers * model.num_attention_heads * model.head_dim * keys
