"""Meta's `params.json` against ModelConfig, every field accounted for in both directions."""

import math

from megatron_llama3.checkpoint.files.foreign_config import as_field, as_type
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig

_SAME_VALUE = {  # Meta's name -> ours
    "dim": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "use_scaled_rope": "use_rope_scaling",
}
# What Meta's code holds as constants or does not hold; written only where a model has another value, and passed over by Meta's code.
_EXTENSIONS = {
    "rope_scaling_factor": "rope_scaling_factor",
    "rope_low_freq_factor": "rope_scaling_low_freq_factor",
    "rope_high_freq_factor": "rope_scaling_high_freq_factor",
    "rope_original_max_position_embeddings": "rope_scaling_original_max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "init_method_std",
}
_FFN_FIELDS = ("multiple_of", "ffn_dim_multiplier")
_DEFAULTS = {"norm_eps": 1e-5, "rope_theta": 500_000, "use_scaled_rope": False, "vocab_size": -1, "multiple_of": 256}
_WITHOUT_EFFECT = {"max_batch_size", "max_seq_len"}
_RELEASED_FFN = ((1.5, 256), (1.0, 256), (1.3, 4096), (1.2, 4096), (1.3, 1024))  # 3.2 1B, 3.2 3B, 70B, 405B, 8B


def config_from_meta(params: dict, vocab_size: int, ffn_hidden_size: int, tied: bool, where: object) -> ModelConfig:
    """ModelConfig of a `params.json` and of what only the weights tell. KV heads are those that the file states, duplicates included.

    Raises UserError for an unknown field, a missing one, one of another type, or sizes that the weights contradict.
    """
    for key, value in params.items():
        if key not in {*_SAME_VALUE, *_EXTENSIONS, *_FFN_FIELDS, *_WITHOUT_EFFECT} and value not in (None, False, -1):
            raise UserError(f"{where}: unknown field {key} = {value!r}, which may change the numbers of the model")
    params = _DEFAULTS | {key: value for key, value in params.items() if value is not None}
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise UserError(f"{where}: the field {key} is missing")
    if params["vocab_size"] not in (-1, vocab_size):
        raise UserError(f"{where}: vocab_size is {params['vocab_size']}, the embedding has {vocab_size} rows")
    params = {"n_kv_heads": params["n_heads"], **params, "vocab_size": vocab_size}
    values = {ours: as_field(ours, params[key], key, where) for key, ours in _SAME_VALUE.items()}
    if values["hidden_size"] % values["num_attention_heads"]:
        raise UserError(f"{where}: n_heads {values['num_attention_heads']} does not divide dim {values['hidden_size']}")
    multiplier = params.get("ffn_dim_multiplier")
    if multiplier is not None:
        multiplier = as_type(float, multiplier, "ffn_dim_multiplier", where)
    expected = ffn_size(values["hidden_size"], multiplier, as_type(int, params["multiple_of"], "multiple_of", where))
    if expected != ffn_hidden_size:
        rule = f"multiple_of and ffn_dim_multiplier make the feed-forward {expected} wide"
        raise UserError(f"{where}: {rule}, the weights have {ffn_hidden_size}")
    extensions = {ours: as_field(ours, params[key], key, where) for key, ours in _EXTENSIONS.items() if key in params}
    extensions.setdefault("max_position_embeddings", _usual_length(values["use_rope_scaling"]))
    return ModelConfig(**values, **extensions, ffn_hidden_size=ffn_hidden_size, untie_embeddings_and_output_weights=not tied)


def config_to_meta(model: ModelConfig, num_shards: int) -> dict:
    """The content of `params.json` for `num_shards` shards (more shards than KV heads: the heads are duplicated, and counted so).

    Raises UserError for a model that Meta's code cannot hold.
    """
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        heads = f"{model.num_attention_heads} heads of {model.head_dim}"
        raise UserError(f"Meta's format has no head width of its own: {heads} are not the hidden size {model.hidden_size}")
    if model.qk_layernorm:
        raise UserError("--qk-layernorm: Meta's code has no norms of queries and keys")
    params = {key: getattr(model, ours) for key, ours in _SAME_VALUE.items()}
    params["n_kv_heads"] = max(model.num_query_groups, num_shards)
    params["rope_theta"] = float(model.rotary_base)
    params["ffn_dim_multiplier"], params["multiple_of"] = _ffn_fields(model.hidden_size, model.ffn_hidden_size)
    usual = ModelConfig(max_position_embeddings=_usual_length(model.use_rope_scaling))
    return params | {key: getattr(model, ours) for key, ours in _EXTENSIONS.items() if getattr(model, ours) != getattr(usual, ours)}


def ffn_size(hidden_size: int, multiplier: float | None, multiple_of: int) -> int:
    """Width of the feed-forward by Meta's rule: two thirds of 4*hidden, times a factor, rounded up to a multiple."""
    width = int(2 * 4 * hidden_size / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def _ffn_fields(hidden_size: int, width: int) -> tuple[float, int]:
    """(ffn_dim_multiplier, multiple_of) whose rule gives `width`: a released pair if one fits, else the shortest multiplier that does."""
    for pair in _RELEASED_FFN:
        if ffn_size(hidden_size, *pair) == width:
            return pair
    multiple_of = math.gcd(width, 4096)
    exact = (width - (multiple_of - 1) / 2) / int(2 * 4 * hidden_size / 3)
    candidates = (round(exact, digits) for digits in range(1, 18))
    return next(value for value in candidates if ffn_size(hidden_size, value, multiple_of) == width), multiple_of


def _usual_length(scaled: bool) -> int:
    return 131_072 if scaled else 8192
