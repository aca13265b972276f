"""What a Llama 3 model is: sizes, RoPE scaling, and the parameter and FLOP counts that follow by formula (paper, section 3.2)."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class ModelConfig:
    """The architecture. `num_query_groups` is Megatron's name for the number of key/value heads, `kv_channels` for the head dimension."""

    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 768
    num_attention_heads: int = 8
    num_query_groups: int = 4
    kv_channels: int | None = None
    vocab_size: int = 8192
    max_position_embeddings: int = 8192
    norm_epsilon: float = 1e-5
    rotary_base: float = 500_000.0
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    rope_scaling_low_freq_factor: float = 1.0
    rope_scaling_high_freq_factor: float = 4.0
    rope_scaling_original_max_position_embeddings: int = 8192
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads
