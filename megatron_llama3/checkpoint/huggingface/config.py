"""Hugging Face's `config.json` against ModelConfig, every field accounted for in both directions.

A field that would change the numbers and that our model does not have is refused; nothing is dropped in silence.
"""

from dataclasses import fields

from megatron_llama3.checkpoint.files.foreign_config import as_field, as_type
from megatron_llama3.checkpoint.tokenizer_files import TOKEN_IDS
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig

_SAME_VALUE = {  # Hugging Face's name -> ours
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_method_std",
}
_ROPE_NUMBERS = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_scaling_low_freq_factor",
    "high_freq_factor": "rope_scaling_high_freq_factor",
    "original_max_position_embeddings": "rope_scaling_original_max_position_embeddings",
}
# head_dim, rope_*, tie_*, model_type
_CHANGED_VALUE = {"kv_channels", "rotary_base", "use_rope_scaling", "untie_embeddings_and_output_weights", "qk_layernorm"}
_OPTIONAL = {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}  # LlamaConfig's defaults
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What our model is, as Hugging Face says it: any other value is another model.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "quantization_config": None,
}
_READ_ELSEWHERE = {
    *["architectures", "model_type", "layer_types", "head_dim", "tie_word_embeddings"],
    *["rope_parameters", "rope_scaling", "rope_theta", "_attn_implementation"],
}
# How attention is computed; "org/name" would have transformers load that organisation's code.
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_WITHOUT_EFFECT = {  # bookkeeping, `pretraining_tp`, which only splits the same products, and a bound on windows that are not used
    *TOKEN_IDS, "dtype", "torch_dtype", "transformers_version", "use_cache", "pretraining_tp", "_name_or_path",
    "is_llama_config", "transformers.js_config", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "is_encoder_decoder", "add_cross_attention", "unsloth_version", "unsloth_fixed",
    "max_window_layers",
}  # fmt: skip


def config_to_hf(model: ModelConfig, dtype: str = "bfloat16", token_ids: dict | None = None) -> dict:
    """The content of `config.json`. RoPE is written for transformers 5 (`rope_parameters`) and before it (`rope_theta`, `rope_scaling`).

    Raises UserError for a ModelConfig field that Hugging Face's LlamaConfig cannot say.
    """
    known = set(_SAME_VALUE.values()) | set(_ROPE_NUMBERS.values()) | _CHANGED_VALUE
    for field in fields(model):
        if field.name not in known and getattr(model, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} {getattr(model, field.name)}: Hugging Face's LlamaConfig has no such field")
    theta, model_type = float(model.rotary_base), "qwen3" if model.qk_layernorm else "llama"
    scaling = {"rope_type": "llama3"} | {theirs: getattr(model, ours) for theirs, ours in _ROPE_NUMBERS.items()}
    return {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        **{key: _REQUIRED[key] for key in ("hidden_act", "attention_bias", "mlp_bias", "attention_dropout")},
        **{theirs: getattr(model, ours) for theirs, ours in _SAME_VALUE.items()},
        "head_dim": model.head_dim,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "rope_parameters": (scaling if model.use_rope_scaling else {"rope_type": "default"}) | {"rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": scaling if model.use_rope_scaling else None,
        **{key: (token_ids or {}).get(key) for key in TOKEN_IDS},  # null where unknown: LlamaConfig's defaults are Llama 2's
        "dtype": dtype,
        "torch_dtype": dtype,
        "pretraining_tp": 1,
        "use_cache": True,
    }


def config_from_hf(config: dict, where: object = "config.json") -> ModelConfig:
    """ModelConfig of the `config.json` of a LlamaForCausalLM, or of a Qwen3ForCausalLM, which is one with norms of queries and keys.
    `where` names the file in errors.

    Raises UserError for another architecture, a field that our model lacks, a missing field or one of another type, or two RoPE forms that
    disagree.
    """
    model_type = str(config.get("model_type"))
    architectures = config.get("architectures") or [_ARCHITECTURES.get(model_type)]
    if model_type not in _ARCHITECTURES or architectures != [_ARCHITECTURES[model_type]]:
        named = architectures[0] if isinstance(architectures, list) else architectures
        raise UserError(f"{where}: {named} (model_type {model_type!r}) is not {' or '.join(_ARCHITECTURES.values())}")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise UserError(f"{where}: layer_types is {config['layer_types']}; Llama 3 has 'full_attention' in all layers")
    for key, value in config.items():
        if key in _REQUIRED and value != _REQUIRED[key]:
            raise UserError(f"{where}: {key} is {value!r}; Llama 3 has {_REQUIRED[key]!r}")
        if key not in {*_REQUIRED, *_SAME_VALUE, *_READ_ELSEWHERE, *_WITHOUT_EFFECT} and value not in (None, False):
            raise UserError(f"{where}: unknown field {key} = {value!r}; remove it if it does not change the numbers of the model")
    if config.get("_attn_implementation") not in _ATTENTION:
        name = config["_attn_implementation"]
        raise UserError(f"{where}: _attn_implementation is {name!r}, which asks for code from elsewhere: remove it")
    values, is_qwen3 = {}, model_type == "qwen3"
    for theirs, ours in _SAME_VALUE.items():
        value = config.get(theirs)
        if value is None and not is_qwen3:
            value = config["num_attention_heads"] if theirs == "num_key_value_heads" else _OPTIONAL.get(theirs)
        if value is None:
            raise UserError(f"{where}: the field {theirs} is missing")
        values[ours] = as_field(ours, value, theirs, where)
    tied = as_type(bool, config.get("tie_word_embeddings", False), "tie_word_embeddings", where)
    model = ModelConfig(**values, untie_embeddings_and_output_weights=not tied, qk_layernorm=is_qwen3, **_rope(config, where))
    head_dim = config.get("head_dim")
    if is_qwen3 and head_dim is None:  # Qwen3Config's defaults are not LlamaConfig's: no real file relies on them
        raise UserError(f"{where}: the field head_dim is missing")
    if head_dim not in (None, model.head_dim):
        model.kv_channels = as_type(int, head_dim, "head_dim", where)
    return model


def _rope(config: dict, where: object) -> dict:
    """The RoPE fields of ModelConfig from whichever form is there; both, where both are."""
    forms = []
    if config.get("rope_parameters"):
        forms.append(_rope_form(config["rope_parameters"], "rope_parameters", config.get("rope_theta"), where))
    if "rope_theta" in config or config.get("rope_scaling") or not forms:
        forms.append(_rope_form(config.get("rope_scaling") or {}, "rope_scaling", config.get("rope_theta"), where))
    if forms[0] != forms[-1]:
        raise UserError(f"{where}: rope_parameters says {forms[0]} and rope_theta with rope_scaling says {forms[-1]}")
    return forms[0]


def _rope_form(form: dict, key: str, theta: float | None, where: object) -> dict:
    if not isinstance(form, dict):
        raise UserError(f"{where}: {key} is {form!r}, no JSON object")
    kind = form.get("rope_type", form.get("type", "default"))
    base = form.get("rope_theta", 10_000 if theta is None else theta)  # 10,000: LlamaConfig's default
    values = {"rotary_base": as_field("rotary_base", base, "rope_theta", where)}  # --rotary-base is whole, as in Megatron-LM
    numbers = {name: value for name, value in form.items() if name not in ("rope_type", "type", "rope_theta") and value is not None}
    if kind == "default" and numbers and numbers != {"partial_rotary_factor": 1.0}:
        raise UserError(f"{where}: {key} of type 'default' has {sorted(numbers)}, which only other types use")
    if kind == "default":
        return values
    if kind != "llama3":
        raise UserError(f"{where}: {key} of type {kind!r}; Llama 3 has 'default' or 'llama3'")
    if set(numbers) != set(_ROPE_NUMBERS):
        raise UserError(f"{where}: {key} of type 'llama3' has {sorted(numbers)}, needs {sorted(_ROPE_NUMBERS)}")
    scaling = {ours: as_field(ours, numbers[theirs], f"{theirs} of {key}", where) for theirs, ours in _ROPE_NUMBERS.items()}
    return values | {"use_rope_scaling": True} | scaling
