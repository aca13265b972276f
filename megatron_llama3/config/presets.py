"""Named model sizes (paper, Table 3; 3.2 model cards). `llama3-*` are the 8K models; `llama3.1-*` are they with RoPE scaling for 128K."""

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig


def _llama(layers: int, width: int, ffn: int, heads: int, **other) -> dict:
    sizes = {"num_layers": layers, "hidden_size": width, "ffn_hidden_size": ffn, "num_attention_heads": heads}
    return {**sizes, "num_query_groups": 8, "vocab_size": 128_256, "max_position_embeddings": 8192, **other}


_LONG = {"use_rope_scaling": True, "max_position_embeddings": 131_072}
# Meta's own code scales every size by 8; the published Hugging Face configs of 1B and 3B, which people load and export, say 32.
_SMALL = {**_LONG, "rope_scaling_factor": 32.0, "untie_embeddings_and_output_weights": False}

_8B, _70B, _405B = (32, 4096, 14_336, 32), (80, 8192, 28_672, 64), (126, 16_384, 53_248, 128)

PRESETS: dict[str, dict] = {
    "tiny": {},  # the dataclass defaults, 7.3M parameters: a model for tests
    "quickstart": {"num_layers": 8},  # tiny, twice as deep: what a CPU trains in minutes
    "llama3-8b": _llama(*_8B),
    "llama3-70b": _llama(*_70B),
    "llama3-405b": _llama(*_405B),
    "llama3.1-8b": _llama(*_8B, **_LONG),
    "llama3.1-70b": _llama(*_70B, **_LONG),
    "llama3.1-405b": _llama(*_405B, **_LONG),
    "llama3.2-1b": _llama(16, 2048, 8192, 32, **_SMALL),
    "llama3.2-3b": _llama(28, 3072, 8192, 24, **_SMALL),
}


def preset(name: str) -> ModelConfig:
    """The named size as a fresh ModelConfig. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"--model-name {name}: no such model; there are {', '.join(PRESETS)}")
    return ModelConfig(**PRESETS[name])


def preset_name(model: ModelConfig) -> str | None:
    """The preset that equals `model`, if any."""
    return next((name for name, fields in PRESETS.items() if ModelConfig(**fields) == model), None)
