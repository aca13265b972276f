"""Which fields of a config may differ between a checkpoint and the run that loads it.

A field may change freely (layout, engine, logging, saving), may change on the user's word (learning-rate schedule; data and batch), or
must match (model; the tokenizer, which store.py compares by content). A violation is one line.
"""

from dataclasses import fields

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig

SCHEDULE_FIELDS = (
    *("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_warmup_samples"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
)
DATA_FIELDS = ("data_path", "train_data_path", "valid_data_path", "split", "seq_length", "seq_length_schedule")
SEMANTIC_DATA_FIELDS = ("reset_position_ids", "document_mask", "loss_across_documents")
BATCH_FIELDS = ("global_batch_size", "step_batch_size_schedule")


def check_compatible(saved: RunConfig, current: RunConfig, path: str) -> None:
    """Raises UserError for the first difference that is not allowed. With --finetune only the model's weights must fit."""
    _must_match(saved.model, current.model, _weight_fields() if current.checkpoint.finetune else _all_fields(saved.model), path)
    if current.checkpoint.finetune:
        return
    if not current.checkpoint.override_opt_param_scheduler:
        _check_schedule(saved, current, path)
    if not current.checkpoint.override_data:
        _needs_flag(_data(saved), _data(current), "--override-data", path)


def _check_schedule(saved: RunConfig, current: RunConfig, path: str) -> None:
    flag = "--override-opt-param-scheduler"
    theirs, ours = ({name: getattr(c.optimizer, name) for name in SCHEDULE_FIELDS} for c in (saved, current))
    _needs_flag(theirs, ours, flag, path)
    said_by, *here = _end_of_decay(current)
    _, *there = _end_of_decay(saved)
    if here != there and current.optimizer.lr_decay_style != "constant":
        here, there = " ".join(here), " ".join(there)
        raise UserError(f"{said_by}: the decay ends at {here} here and at {there} in {path}: add {flag} if that is meant")


def _end_of_decay(config: RunConfig) -> tuple[str, str, str]:
    """(the flag that says it, number, unit)"""
    optimizer, training = config.optimizer, config.training
    unit = "steps" if training.train_samples is None else "sequences"
    names = ("lr_decay_iters", "train_iters") if training.train_samples is None else ("lr_decay_samples", "train_samples")
    name = names[0] if getattr(optimizer, names[0]) else names[1]
    return _flag(name), str(getattr(optimizer, name, None) or getattr(training, name)), unit


def _data(config: RunConfig) -> dict:
    values = {name: getattr(config.data, name) for name in DATA_FIELDS + SEMANTIC_DATA_FIELDS}
    return values | {name: getattr(config.training, name) for name in BATCH_FIELDS}


def _all_fields(section) -> list[str]:
    return [f.name for f in fields(section)]


def _weight_fields() -> list[str]:
    """What the shapes of the weights depend on."""
    return [
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "vocab_size",
        "untie_embeddings_and_output_weights",
    ]  # fmt: skip


def _must_match(saved, current, names: list[str], path: str) -> None:
    for name in names:
        theirs, ours = getattr(saved, name), getattr(current, name)
        if theirs != ours:
            raise UserError(f"{_flag(name)} is {ours} here and {theirs} in {path}: it must match")


def _needs_flag(saved: dict, current: dict, flag: str, path: str) -> None:
    for name, theirs in saved.items():
        if theirs != current[name]:
            raise UserError(f"{_flag(name)} is {current[name]} here and {theirs} in {path}: add {flag} if that is meant")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
