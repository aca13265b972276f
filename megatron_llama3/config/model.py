"""What a Llama 3 model is: sizes and RoPE scaling (paper, section 3.2). presets.py has named sizes, model/sharding.py the weights."""

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
    rope_scaling_factor: float = option(8.0, "RoPE scaling: low frequencies are divided by this.", needs="use_rope_scaling")
    rope_scaling_low_freq_factor: float = option(
        1.0, "RoPE scaling: wavelengths above original length / this are fully scaled.", needs="use_rope_scaling"
    )
    rope_scaling_high_freq_factor: float = option(
        4.0, "RoPE scaling: wavelengths below original length / this are left alone.", needs="use_rope_scaling"
    )
    rope_scaling_original_max_position_embeddings: int = option(
        8192, "RoPE scaling: context length before scaling.", needs="use_rope_scaling"
    )
    untie_embeddings_and_output_weights: bool = option(True, "Separate input and output embeddings (all sizes but 1B and 3B).")
    qk_layernorm: bool = option(False, "Norm of each head's queries and keys before RoPE (not in Llama 3; Qwen3 is Llama with it).")
    init_method_std: float = option(0.02, "Standard deviation of initial weights.")

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads
