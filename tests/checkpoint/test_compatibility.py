"""What a run that loads a checkpoint may have changed, what it needs a flag for, and what must stay as it was."""

from copy import deepcopy

import pytest

from megatron_llama3.checkpoint.compatibility import check_compatible
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig


def run_config(**changes) -> RunConfig:
    """`section__field=value` for each change; dates of a schedule are in steps unless a change says otherwise."""
    config = RunConfig()
    config.training.train_iters, config.optimizer.lr_warmup_iters = 100, 10
    for name, value in changes.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    return config


def refusal(saved: RunConfig, current: RunConfig) -> str | None:
    before = deepcopy((saved, current))
    try:
        check_compatible(saved, current, "RUN/iter_0000005")
    except UserError as error:
        return str(error)
    finally:
        assert (saved, current) == before
    return None


@pytest.mark.parametrize("changes", [
    {"parallel__tensor_model_parallel_size": 4, "parallel__engine": "deepspeed"}, {"logging__log_interval": 7},
    {"checkpoint__save": "elsewhere"}, {"training__micro_batch_size": 9}, {"optimizer__weight_decay": 0.3},
])  # fmt: skip
def test_layout_engine_logging_and_saving_change_freely(changes):
    assert refusal(run_config(), run_config(**changes)) is None


@pytest.mark.parametrize("field, there, here, is_of_the_weights", [
    ("num_layers", 2, 4, True), ("hidden_size", 64, 128, True), ("vocab_size", 256, 512, True), ("num_query_groups", 2, 4, True),
    ("untie_embeddings_and_output_weights", True, False, True), ("norm_epsilon", 1e-5, 1e-6, False), ("rotary_base", 5e5, 1e4, False),
])  # fmt: skip
def test_the_model_must_match_and_for_a_fine_tuning_its_weights(field, there, here, is_of_the_weights):
    changes = {f"model__{field}": there}, {f"model__{field}": here}
    flag = "--" + field.replace("_", "-")
    expected = f"{flag} is {here} here and {there} in RUN/iter_0000005: it must match"
    overrides = {"checkpoint__override_data": True, "checkpoint__override_opt_param_scheduler": True}
    assert refusal(run_config(**changes[0]), run_config(**changes[1], **overrides)) == expected
    finetuned = refusal(run_config(**changes[0]), run_config(**changes[1], checkpoint__finetune=True))
    assert finetuned == (expected if is_of_the_weights else None)


DATA = {"data__data_path": ["b"], "data__split": "9,1,0", "data__seq_length": 64, "data__reset_position_ids": True,
        "data__document_mask": False, "data__loss_across_documents": True, "training__global_batch_size": 64,
        "training__step_batch_size_schedule": "0:8 9:16", "data__seq_length_schedule": "0:8 9:16"}  # fmt: skip
SCHEDULE = {"optimizer__lr": 0.5, "optimizer__min_lr": 1e-9, "optimizer__lr_decay_style": "WSD", "optimizer__lr_warmup_iters": 3,
            "optimizer__lr_wsd_decay_iters": 5, "optimizer__lr_wsd_decay_style": "linear", "optimizer__lr_warmup_samples": 8}  # fmt: skip


@pytest.mark.parametrize("changes, flag, other", [
    *((pair, "override_data", "override_opt_param_scheduler") for pair in DATA.items()),
    *((pair, "override_opt_param_scheduler", "override_data") for pair in SCHEDULE.items()),
], ids=str)  # fmt: skip
def test_data_and_schedule_change_on_the_users_word_alone(changes, flag, other):
    name, value = changes
    section, _, field = name.partition("__")
    there = getattr(getattr(run_config(), section), field)
    assert there != value
    said = f"--{field.replace('_', '-')} is {value} here and {there} in RUN/iter_0000005: add --{flag.replace('_', '-')} if that is meant"
    changed = {name: value}
    assert refusal(run_config(), run_config(**changed)) == said
    assert refusal(run_config(), run_config(**changed, **{f"checkpoint__{other}": True})) == said
    assert refusal(run_config(), run_config(**changed, **{f"checkpoint__{flag}": True})) is None
    assert refusal(run_config(), run_config(**changed, checkpoint__finetune=True)) is None


IN_SEQUENCES = {"training__train_samples": 800, "training__train_iters": None}


@pytest.mark.parametrize("saved, current, said", [
    ({}, {"training__train_iters": 200}, "--train-iters: the decay ends at 200 steps here and at 100 steps"),
    ({}, {"optimizer__lr_decay_iters": 90}, "--lr-decay-iters: the decay ends at 90 steps here and at 100 steps"),
    ({"optimizer__lr_decay_iters": 90}, {}, "--train-iters: the decay ends at 100 steps here and at 90 steps"),
    ({}, IN_SEQUENCES, "--train-samples: the decay ends at 800 sequences here and at 100 steps"),
    (IN_SEQUENCES, IN_SEQUENCES | {"optimizer__lr_decay_samples": 100}, "--lr-decay-samples: the decay ends at 100 sequences here and at"),
    (IN_SEQUENCES, {"training__train_iters": 800}, "--train-iters: the decay ends at 800 steps here and at 800 sequences"),
    ({}, {"optimizer__lr_decay_iters": 100}, None), ({"optimizer__lr_decay_iters": 100}, {"training__train_iters": 100}, None),
    (IN_SEQUENCES, IN_SEQUENCES | {"training__train_iters": 7}, None),
    ({"optimizer__lr_decay_iters": 90}, {"optimizer__lr_decay_iters": 90, "training__train_iters": 200}, None),
])  # fmt: skip
def test_the_end_of_the_decay_counts_wherever_it_is_said(saved, current, said):
    found = refusal(run_config(**saved), run_config(**current))
    assert (found and found[: len(said)]) == said
    assert not found or found.endswith(" in RUN/iter_0000005: add --override-opt-param-scheduler if that is meant")
    constant = {"optimizer__lr_decay_style": "constant"}
    assert refusal(run_config(**saved, **constant), run_config(**current, **constant)) is None
