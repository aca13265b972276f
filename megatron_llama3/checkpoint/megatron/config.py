"""The arguments that Megatron-LM keeps in `common.pt` against our config."""

import argparse

import torch

from megatron_llama3.checkpoint.files.foreign_config import as_field
from megatron_llama3.checkpoint.lazy_tensor import OptimizerState, WeightSource
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.run import RunConfig

_SAME_VALUE = (  # one name in both
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings", "norm_epsilon", "rotary_base"),
    *("untie_embeddings_and_output_weights", "use_rope_scaling", "rope_scaling_factor", "qk_layernorm", "init_method_std"),
)
_DEFAULTS = {"rotary_base": 10_000, "use_rope_scaling": False, "rope_scaling_factor": 8.0, "qk_layernorm": False, "init_method_std": 0.02}
# What our model is, as Megatron-LM says it: any other value is another model. Arguments that are not there are at these.
_REQUIRED = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
    "num_experts": None,
    "mtp_num_layers": None,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "window_size": None,
}
_RUN_FIELDS = {
    "optimizer": (
        *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
    ),
    "training": ("global_batch_size", "micro_batch_size", "train_iters", "seed"),
    "data": ("seq_length",),
}
_ROPE_CONSTANTS = {  # of Megatron-LM's code
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 8192,
}


def config_from_megatron(arguments: dict, vocab_size: int, where: object) -> ModelConfig:
    """ModelConfig of Megatron-LM's arguments. Raises UserError for one that is missing, of another type, or says another architecture."""
    for key, value in _REQUIRED.items():
        found = arguments.get(key, value)
        if found != value:
            raise UserError(f"{where}: {key} is {found!r}, Llama 3 has {value!r}")
    arguments = _DEFAULTS | {key: value for key, value in arguments.items() if value is not None}
    missing = [key for key in _SAME_VALUE if key not in arguments]
    if missing:
        raise UserError(f"{where}: the argument {missing[0]} is missing")
    values = {key: as_field(key, arguments[key], key, where) for key in _SAME_VALUE}
    is_grouped = arguments.get("group_query_attention", "num_query_groups" in arguments)
    groups = arguments.get("num_query_groups", 1) if is_grouped else values["num_attention_heads"]
    values["num_query_groups"] = as_field("num_query_groups", groups, "num_query_groups", where)
    if "kv_channels" in arguments:
        width = as_field("num_layers", arguments["kv_channels"], "kv_channels", where)
        values["kv_channels"] = width if width * values["num_attention_heads"] != values["hidden_size"] else None
    return ModelConfig(**values, vocab_size=vocab_size)


def run_from_megatron(arguments: dict, model: ModelConfig) -> RunConfig:
    """What of the run's arguments our config has by the same names; those of other types or out of range are at our defaults."""
    run = RunConfig(model=model)
    for section, names in _RUN_FIELDS.items():
        for name in names:
            value, part = arguments.get(name), getattr(run, section)
            if _fits(value, getattr(part, name)):
                setattr(part, name, value)
    return run


def _fits(value: object, ours: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    kind = int if ours is None else type(ours)
    return value in ("cosine", "linear", "constant", "WSD") if kind is str else isinstance(value, kind | int) and 0 <= value < 2**63


def _run_arguments(run: RunConfig) -> dict:
    return {name: getattr(getattr(run, section), name) for section, names in _RUN_FIELDS.items() for name in names}


def optimizer_groups(state: OptimizerState) -> list[dict]:
    """Adam's groups as Megatron-LM keeps them: matrices, and norms, whose decay is multiplied by 0. They have what torch's AdamW and
    Transformer Engine's look for."""
    options = state.run.optimizer
    common = {
        "is_expert_parallel": False, "is_decoupled_lr": False, "default_config": True, "lr_mult": 1.0, "max_lr": options.lr,
        "min_lr": options.min_lr, "lr": options.lr, "betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_eps,
        "bias_correction": True, "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
        "fused": None, "decoupled_weight_decay": True, "step": state.step,
    }  # fmt: skip
    return [common | {"wd_mult": multiplier, "weight_decay": multiplier * options.weight_decay} for multiplier in (1.0, 0.0)]


def scheduler_state(state: OptimizerState) -> dict:
    """Of Megatron-LM's OptimizerParamScheduler, which counts in sequences."""
    options, training = state.run.optimizer, state.run.training
    batch = training.global_batch_size or 1
    decay = options.lr_decay_samples or (options.lr_decay_iters or training.train_iters or state.iteration) * batch
    return {
        "max_lr": options.lr, "min_lr": options.min_lr, "lr_decay_style": options.lr_decay_style, "lr_decay_steps": decay,
        "lr_warmup_steps": options.lr_warmup_samples or options.lr_warmup_iters * batch, "num_steps": state.consumed_samples,
        "start_wd": options.weight_decay, "end_wd": options.weight_decay, "wd_incr_style": "constant", "wd_incr_steps": decay,
    }  # fmt: skip


def arguments_for_megatron(source: WeightSource, padded_vocab_size: int, dtype: torch.dtype, is_te: bool) -> argparse.Namespace:
    """What Megatron-LM's `--use-checkpoint-args` and its check of a checkpoint read. Raises UserError for a RoPE that its code lacks."""
    model, state = source.model, source.optimizer
    for name, value in _ROPE_CONSTANTS.items() if model.use_rope_scaling else ():
        if getattr(model, name) != value:
            raise UserError(f"--to megatron: {name} is {getattr(model, name)}, Megatron-LM's code has {value} and no flag for it")
    values = {"seq_length": model.max_position_embeddings} if state is None else _run_arguments(state.run)
    values |= {key: value for key, value in _REQUIRED.items() if key not in ("softmax_type", "window_size")}
    values |= {name: getattr(model, name) for name in _SAME_VALUE}
    return argparse.Namespace(
        **values,
        num_query_groups=model.num_query_groups,
        group_query_attention=model.num_query_groups != model.num_attention_heads,
        kv_channels=model.head_dim,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocab_size,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        transformer_impl="transformer_engine" if is_te else "local",
        use_distributed_optimizer=state is not None,
        no_save_optim=state is None,
        no_save_rng=True,
        iteration=0 if state is None else state.iteration,
        consumed_train_samples=0 if state is None else state.consumed_samples,
        consumed_valid_samples=0,
    )
