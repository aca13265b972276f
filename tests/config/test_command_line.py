"""Flags, YAML and presets make one RunConfig; what is misspelt, unknown or contradictory is one clear line."""

import re
import subprocess
import sys

import pytest

from megatron_llama3.config.command_line import build_parser, load_run_config, parse_run_config, resolved_yaml
from megatron_llama3.config.errors import UserError, exit_on_user_error
from megatron_llama3.config.fields import field_specs
from megatron_llama3.config.megatron_flags import explain, fixed_flags, flags_without_effect, megatron_flags
from megatron_llama3.config.presets import PRESETS, preset
from megatron_llama3.config.run import RunConfig


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def parse(text: str) -> RunConfig:
    return parse_run_config(["--dry-run", *text.split()])


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_run_config(["--dry-run", *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_has_help_and_a_flag():
    options = build_parser()._option_string_actions
    for spec in field_specs(RunConfig):
        assert spec.help, spec.name
        assert spec.flag in options
        assert options[spec.flag].help.startswith(spec.help.replace("%", "%%"))


def test_flags_override_yaml_which_overrides_the_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name: llama3-8b\nmodel:\n  num_layers: 10\n  hidden_size: 2048\noptimizer:\n  lr: 3e-4\n  bf16: true\n")
    config = parse(f"--config {path} --num-layers 12 --no-bf16")
    assert (config.model.num_layers, config.model.hidden_size, config.model.ffn_hidden_size) == (12, 2048, 14_336)
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.bf16 is False
    assert parse(f"--config {path} --model-name llama3-70b").model.ffn_hidden_size == 28_672


def test_resolved_config_reads_back_equal(tmp_path):
    config = parse(
        "--model-name llama3.1-405b --world-size 512 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --sequence-parallel "
        "--num-layers-per-virtual-pipeline-stage 1 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split "
        "--data-path 0.3 /a 0.7 /b --lr 8e-5 --adam-eps 1e-12 --no-document-mask --wandb-project yes --split 969,30,1"
    )
    path = tmp_path / "run_config.yaml"
    path.write_text(resolved_yaml(config))
    again = load_run_config(str(path))
    assert again.dry_run is False
    again.dry_run = True
    assert again == config
    assert config.parallel.num_virtual_stages_per_pipeline_rank == 8
    assert config.data.document_mask is False
    assert config.data.data_path == ["0.3", "/a", "0.7", "/b"]
    reparsed = parse_run_config(["--dry-run", "--config", str(path)])
    assert reparsed == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_to_itself(name):
    assert parse(f"--model-name {name}").model == preset(name)


def test_booleans_have_an_override_and_negative_names_a_positive_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint:\n  no_load_optim: true\n  finetune: true\n")
    config = parse(f"--config {path} --load-optim --no-finetune")
    assert config.checkpoint.no_load_optim is False
    assert config.checkpoint.finetune is False
    assert parse("--no-load-optim").checkpoint.no_load_optim is True


def test_aliases():
    flags = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --world-size 2"
    for alias in ("--microbatch-group-size-per-vp-stage", "--microbatch-group-size-per-virtual-pipeline-stage"):
        assert parse(f"{flags} {alias} 3").parallel.microbatch_group_size_per_vp_stage == 3
    for alias in ("--override-opt_param-scheduler", "--override-opt-param-scheduler"):
        assert parse(alias).checkpoint.override_opt_param_scheduler is True


def test_schedules_set_batch_and_length():
    config = parse_run_config(
        ["--dry-run", "--step-batch-size-schedule", "0:8 1K:16", "--seq-length-schedule", "0:512 2K:2048", "--world-size", "4"]
    )
    assert (config.training.global_batch_size, config.data.seq_length) == (16, 2048)
    assert parse("--world-size 4 --micro-batch-size 2").training.global_batch_size == 8


def test_shared_flags_have_megatrons_type_count_and_choices():
    megatron, shared = megatron_flags(), 0
    options = build_parser()._option_string_actions
    for flag, action in options.items():
        if flag not in megatron or action.const is False:
            continue
        shared += 1
        theirs = megatron[flag]
        if theirs["type"] == "switch":
            assert (action.nargs, action.const) == (0, True), flag
            continue
        assert (action.type or str).__name__ == theirs["type"], flag
        assert action.nargs == theirs.get("nargs"), flag
        if "choices" in theirs:
            assert action.choices, flag
            assert set(action.choices) <= set(theirs["choices"]), flag
    assert shared >= 80


def test_no_override_flag_takes_a_name_that_megatron_uses_otherwise():
    """`--no-X` clears our X. Where Megatron-LM has that very flag, it must clear something too."""
    for flag, action in build_parser()._option_string_actions.items():
        if action.const is False and flag in megatron_flags():
            assert flag in ("--async-save",), flag  # the opposite of --no-async-save, with Megatron's meaning


def test_known_megatron_flags_are_on_the_list():
    for flag in ("--tensor-model-parallel-size", "--lr", "--train-samples", "--use-distributed-optimizer", "--rotary-base", "--data-path"):
        assert flag in megatron_flags()


def test_flags_that_llama_fixes():
    config = parse("--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --group-query-attention")
    assert config == parse("")
    for flag, value in (("--normalization", "LayerNorm"), ("--position-embedding-type", "learned_absolute"), ("--hidden-dropout", "0.1")):
        message = refused(flag, value)
        assert flag in message
        assert value in message
    for flag, kwargs in fixed_flags().items():
        theirs = megatron_flags()[flag]
        assert (kwargs.get("action") == "store_true") == (theirs["type"] == "switch"), flag


def test_flags_without_effect_change_nothing_and_are_said_once():
    config = parse("--use-distributed-optimizer --ckpt-format torch_dist --num-workers 8 --overlap-grad-reduce --sequence-parallel")
    assert config == parse("")
    first, second = config.notices
    assert first.startswith("without effect here: --use-distributed-optimizer (")
    for flag in ("--ckpt-format", "--num-workers", "--overlap-grad-reduce"):
        assert first.count(flag) == 1
    assert second == "without effect here: --sequence-parallel (--tensor-model-parallel-size is 1)"
    assert "invalid choice" in refused("--ckpt-format", "papyrus")


def test_flags_without_effect_are_megatrons_and_have_one_meaning():
    assert flags_without_effect().keys() <= megatron_flags().keys()
    assert not flags_without_effect().keys() & fixed_flags().keys()


def test_all_unknown_flags_are_named_at_once():
    with pytest.raises(UserError) as caught:
        parse_run_config(["--dry-run", "--fp8-format", "hybrid", "--lr", "1", "--micro-batch-sise", "3", "--decoupled-lr", "5e-4"])
    first, second, third = str(caught.value).splitlines()
    assert "--fp8-format" in first
    assert "--micro-batch-sise; did you mean --micro-batch-size?" in second
    assert "--decoupled-lr" in third


NVIDIA_8B = """
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
    --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --init-method-std 0.0134
    --attention-backend fused --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1
    --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015
    --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
    --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
    --empty-unused-memory-level 1 --exit-duration-in-mins 235 --fp8-format hybrid --fp8-amax-history-len 1024
    --fp8-amax-compute-algo max --fp8-param-gather --tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --data-path corpus --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model tok --data-cache-path c --split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files
    --num-workers 1 --vocab-size 128256 --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput
    --profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60 --save ck --load ck
    --tensorboard-dir tb
"""
CHANGES_NUMBERS = """
    apply-layernorm-1p decoupled-lr decoupled-min-lr grad-reduce-in-bf16 fp8-format fp8-amax-history-len fp8-amax-compute-algo
    fp8-param-gather
"""


def test_nvidias_example_runs_after_eight_edits_that_the_first_message_names():
    """Its arguments for Llama 3 8B; what would change the model or its numbers is left out."""
    with pytest.raises(UserError) as caught:
        parse(NVIDIA_8B)
    lines, edits = str(caught.value).splitlines(), [f"--{name}" for name in CHANGES_NUMBERS.split()]
    assert len(lines) == len(edits) == 8
    for edit in edits:
        (line,) = [line for line in lines if edit in re.findall(r"--[a-z0-9-]+", line)[:1]]
        assert "leave it out" in line
    kept = [words for words in NVIDIA_8B.replace(" --", "\n--").splitlines() if words.split(" ")[0].strip() not in edits]
    config = parse(" ".join(kept))
    assert config.training.train_iters == 1953125000 // 128
    assert len(config.notices) == 2


def test_unknown_flag_names_the_nearest():
    assert refused("--micro-batch-sise", "3") == "unknown flag --micro-batch-sise; did you mean --micro-batch-size?"
    assert "--seq-length" in refused("--seq-lenght=3")
    assert refused("8") == "unexpected argument '8': every value follows a flag"


def test_no_abbreviations():
    assert "unknown flag --micro-batch" in refused("--micro-batch", "3")


@pytest.mark.parametrize("flag", ["--rampup-batch-size", "--num-experts", "--fp8-format", "--decoupled-lr", "--mock-data"])
def test_megatron_flags_without_counterpart_have_their_own_message(flag):
    message = refused(flag, "3")
    assert "Megatron-LM" in message
    assert flag in message


def test_every_megatron_flag_is_accepted_or_explained():
    options = build_parser()._option_string_actions
    for flag in megatron_flags():
        if flag not in options:
            message = explain(flag, list(options))
            assert "Megatron-LM" in message
            assert flag in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle:\n  num_layers: 3\n", "unknown group 'modle'; did you mean model?"),
        ("model:\n  num_layer: 3\n", "unknown key model.num_layer; did you mean num_layers?"),
        ("model:\n  lr: 3\n", "unknown key model.lr; did you mean optimizer.lr?"),
        ("model:\n  num_layers: three\n", "model.num_layers is 'three': expected int"),
        ("model:\n  num_layers: 3.5\n", "model.num_layers is 3.5: expected int"),
        ("optimizer:\n  bf16: 1\n", "optimizer.bf16 is 1: expected bool"),
        ("optimizer:\n  lr_decay_style: square\n", "optimizer.lr_decay_style is 'square': choose from cosine, linear, constant"),
        ("model:\n  num_layers: 3\n  num_layers: 4\n", "key 'num_layers' is given twice"),
        ("data:\n  data_path: a\n", "data.data_path is 'a': expected a list"),
        ("model: 3\n", "model must hold 'key: value' lines, not 3"),
        ("model_name: llama4\n", "model_name llama4: no such model"),
        ("model: [\n", "not valid YAML"),
        ("- model\n", "must hold groups"),
    ],
)
def test_yaml_mistakes_are_one_line(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refused("--config", str(path))
    assert expected in message


def test_missing_yaml_file():
    assert refused("--config", "/nowhere/run.yaml") == "--config /nowhere/run.yaml: No such file or directory"


def test_bad_values_name_flag_and_value():
    assert refused("--lr", "fast") == "--lr: invalid float value: 'fast'"
    assert "--recompute-granularity" in refused("--recompute-granularity", "some")
    assert "--model-name" in refused("--model-name", "gpt-4")


def test_world_size_comes_from_the_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse("").parallel.world_size == 8
    assert parse("--world-size 16").parallel.world_size == 16
    with pytest.raises(UserError, match=r"--world-size 16, but 8 rank\(s\) were started"):
        parse_run_config(["--world-size", "16"])


def test_several_mistakes_are_a_line_each_and_status_2(capsys):
    def main():
        parse_run_config(["--dry-run", "--num-layers", "0", "--micro-batch-size", "-1"])

    with pytest.raises(SystemExit) as stopped:
        exit_on_user_error(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --num-layers 0: must be above 0\nerror: --micro-batch-size -1: must be above 0\n"


def test_refusing_imports_no_torch():
    program = (
        "import sys\n"
        "from megatron_llama3.config.command_line import parse_run_config\n"
        "from megatron_llama3.config.errors import exit_on_user_error\n"
        "import atexit\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy', 'megatron'} & set(sys.modules))))\n"
        "exit_on_user_error(lambda: parse_run_config(['--dry-run', '--world-size', '6', '--tensor-model-parallel-size', '4']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr == "error: world size 6 is not divisible by TP x PP x CP = 4 x 1 x 1 = 4\n"
