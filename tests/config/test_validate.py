"""Every layout that cannot work is refused in one line that names both numbers; the layouts of the paper pass."""

import pytest

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.errors import UserError

_405B = (
    "--model-name llama3-405b --world-size 16384 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --sequence-parallel "
    "--bf16 --num-layers-per-virtual-pipeline-stage 1 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split "
)
_PP2 = "--world-size 2 --pipeline-model-parallel-size 2 "
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_PP4_8_LAYERS = "--world-size 4 --pipeline-model-parallel-size 4 --num-layers 8 "

# flags, and what the one line must contain
REFUSED = [
    ("--world-size 6 --tensor-model-parallel-size 4", ["world size 6", "= 4"]),
    ("--world-size 12 --context-parallel-size 4 --tensor-model-parallel-size 2", ["world size 12", "= 8"]),
    ("--hidden-size 100", ["--hidden-size 100", "--num-attention-heads 8"]),
    ("--kv-channels 7", ["7 channels"]),
    ("--num-query-groups 3", ["--num-attention-heads 8", "--num-query-groups 3"]),
    ("--world-size 3 --tensor-model-parallel-size 3 --num-query-groups 1 --ffn-hidden-size 768", ["--num-attention-heads 8", "size 3"]),
    (
        "--world-size 6 --tensor-model-parallel-size 6 --num-attention-heads 12 --num-query-groups 4 --hidden-size 240",
        ["--num-query-groups 4", "size 6"],
    ),
    ("--world-size 4 --tensor-model-parallel-size 4 --ffn-hidden-size 770", ["--ffn-hidden-size 770", "size 4"]),
    ("--world-size 8 --tensor-model-parallel-size 8 --vocab-size 9", ["--vocab-size 9", "size 8"]),
    ("--lr-warmup-samples 8", ["--lr-warmup-samples 8", "--train-samples"]),
    ("--train-samples 80 --lr-warmup-iters 8", ["--lr-warmup-iters 8", "--train-samples", "--lr-warmup-samples"]),
    ("--train-samples 5 --global-batch-size 8", ["--train-samples 5", "the first step's 8"]),
    ("--tensor-model-parallel-size 2 --world-size 1", ["world size 1", "--world-size"]),
    ("--train-samples 80 --train-iters 8", ["--train-iters 8", "--train-samples 80", "80 steps"]),
    ("--train-samples 80 --lr-warmup-samples 80", ["--lr-warmup-samples 80", "80"]),
    ("--lr-decay-style WSD --train-iters 9", ["--lr-decay-style WSD", "--lr-wsd-decay-iters"]),
    ("--lr-wsd-decay-iters 3 --train-iters 9", ["--lr-wsd-decay-iters 3", "--lr-decay-style WSD"]),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 8 --lr-warmup-iters 2 --train-iters 9", ["--lr-wsd-decay-iters 8", "2", "9"]),
    ("--save-interval 5", ["--save-interval 5 is given, but no --save folder"]),
    ("--keep-last 2", ["--keep-last 2 is given, but no --save folder"]),
    ("--rope-scaling-factor 32", ["--rope-scaling-factor 32.0 has no effect without --use-rope-scaling"]),
    ("--wandb-exp-name x", ["--wandb-exp-name x has no effect without --wandb-project"]),
    ("--spiky-loss-factor 9", ["--spiky-loss-factor 9.0 has no effect without --check-for-spiky-loss"]),
    ("--profile-ranks 3", ["--profile-ranks [3] has no effect without --profile"]),
    ("--manual-gc-interval 3", ["--manual-gc-interval 3 has no effect without --manual-gc"]),
    ("--profile", ["--profile", "--log-dir"]),
    ("--profile --log-dir x --profile-step-start 5 --profile-step-end 5", ["--profile-step-end 5", "--profile-step-start 5"]),
    ("--profile --log-dir x --profile-ranks 0 3", ["--profile-ranks 3", "1 rank"]),
    ("--world-size 3 --pipeline-model-parallel-size 3", ["4 layers", "3 pipeline ranks", "size 3"]),
    (_PP2 + "--account-for-loss-in-pipeline-split", ["4 layers + 1", "2 pipeline ranks"]),
    (_PP2 + "--num-virtual-stages-per-pipeline-rank 3", ["2 layers", "3 chunks"]),
    (_PP2 + "--num-layers-per-virtual-pipeline-stage 3", ["4 layers", "3", "size 2"]),
    (_PP2 + "--num-layers-per-virtual-pipeline-stage 1 --num-virtual-stages-per-pipeline-rank 2", ["stage 1", "rank 2"]),
    (_PP2 + "--num-layers-per-virtual-pipeline-stage 1 --decoder-first-pipeline-num-layers 2", ["stage 1", "2 layers"]),
    (_PP2 + "--decoder-first-pipeline-num-layers 5", ["4 layers", "first 5"]),
    (_PP2 + "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 1", ["4 layers", "first 1 + last 1"]),
    (_PP2 + "--decoder-first-pipeline-num-layers 1 --account-for-loss-in-pipeline-split", ["1/None", "--account-for"]),
    (_PP4_8_LAYERS + "--decoder-first-pipeline-num-layers 1", ["7 layers", "3 pipeline ranks"]),
    (_PP4_8_LAYERS + "--decoder-first-pipeline-num-layers 4 --decoder-last-pipeline-num-layers 4", ["chunk 1 of 4", "0 layers"]),
    (_PP2 + "--microbatch-group-size-per-vp-stage 2", ["--microbatch-group-size-per-vp-stage 2", "is 1"]),
    ("--num-virtual-stages-per-pipeline-rank 2", ["--num-virtual-stages-per-pipeline-rank 2", "--pipeline-model-parallel-size 1"]),
    ("--num-layers-per-virtual-pipeline-stage 2", ["stage 2", "--pipeline-model-parallel-size 1"]),
    ("--decoder-last-pipeline-num-layers 2", ["2", "--pipeline-model-parallel-size 1"]),
    ("--account-for-embedding-in-pipeline-split", ["--account-for-embedding", "--pipeline-model-parallel-size 1"]),
    ("--pipeline-schedule zero-bubble", ["zero-bubble", "--pipeline-model-parallel-size 1"]),
    (_PP2 + f"--pipeline-schedule zero-bubble {_FULL}", ["zero-bubble", "full"]),
    (_PP2 + "--pipeline-schedule zero-bubble --compile-blocks", ["zero-bubble", "--compile-blocks"]),
    (_PP2 + "--microbatch-group-size-per-vp-stage 0", ["--microbatch-group-size-per-vp-stage 0"]),
    ("--recompute-granularity full", ["full", "--recompute-method (is None)"]),
    ("--recompute-granularity full --recompute-method block", ["full", "--recompute-num-layers (is None)"]),
    ("--recompute-granularity selective --recompute-modules mlp --recompute-num-layers 1", ["selective", "--recompute-num-layers 1"]),
    ("--recompute-granularity selective", ["--recompute-modules layernorm and/or mlp", "core_attn"]),
    ("--recompute-granularity selective --recompute-modules core_attn", ["core_attn", "scores", "layernorm and/or mlp"]),
    ("--recompute-granularity selective --recompute-modules mlp moe", ["mlp moe", "moe saves nothing", "layernorm and/or mlp"]),
    ("--recompute-modules layernorm", ["--recompute-modules layernorm", "--recompute-granularity selective", "None"]),
    ("--recompute-method block", ["--recompute-method block", "None"]),
    ("--recompute-granularity full --recompute-method block --recompute-num-layers 9", ["--recompute-num-layers 9", "--num-layers 4"]),
    ("--seq-length 8200", ["8200", "--max-position-embeddings 8192"]),
    ("--world-size 4 --context-parallel-size 4 --seq-length 1004", ["1004", "2 x 4 = 8"]),
    ("--world-size 4 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 1022", ["1022", "TP 4"]),
    (
        "--world-size 8 --tensor-model-parallel-size 4 --context-parallel-size 2 --sequence-parallel --seq-length 1004",
        ["1004 / CP 2 = 502", "TP 4"],
    ),
    ("--world-size 4 --micro-batch-size 3 --global-batch-size 20", ["batch size 20", "3 x 4 = 12"]),
    ("--world-size 4 --step-batch-size-schedule 0:4_1K:6", ["batch size 6", "1 x 4 = 4"]),
    ("--step-batch-size-schedule 0:4_1K:6 --global-batch-size 5", ["--global-batch-size 5", "6"]),
    ("--seq-length-schedule 0:512_1K:1024 --seq-length 512", ["--seq-length 512", "1024"]),
    ("--world-size 4 --context-parallel-size 4 --seq-length-schedule 0:500_1K:1024", ["500", "= 8"]),
    ("--seq-length-schedule 0:512_1K:9000", ["9000", "8192"]),
    ("--step-batch-size-schedule 1K:4", ["1K:4", "must be 0"]),
    ("--step-batch-size-schedule 0:4_1Q:8", ["1Q:8", "TOKENS:VALUE"]),
    ("--step-batch-size-schedule 0:4_2K:8_1K:16", ["1,000", "2,000"]),
    ("--step-batch-size-schedule 0:0", ["0:0", "at least 1"]),
    ("--bf16 --fp64", ["--bf16", "--fp64"]),
    ("--zero-stage 2", ["--zero-stage 2", "fsdp"]),
    ("--optimizer-cpu-offload", ["--optimizer-cpu-offload", "fsdp"]),
    ("--engine deepspeed --zero-stage 4", ["--zero-stage 4"]),
    ("--engine deepspeed --zero-stage 0", ["--zero-stage 0"]),
    ("--engine deepspeed --fp64", ["deepspeed", "--fp64"]),
    ("--engine deepspeed --zero-stage 3 --compile-blocks", ["--zero-stage 3", "--compile-blocks"]),
    (_PP2 + "--engine deepspeed --zero-stage 3", ["--zero-stage 3", "--pipeline-model-parallel-size 2"]),
    ("--world-size 2 --global-batch-size 8 --reduce-gradients-every 4", ["--reduce-gradients-every 4", "4 micro-batches"]),
    ("--global-batch-size 8 --reduce-gradients-every 2", ["--reduce-gradients-every 2", "DP x CP = 1 x 1"]),
    ("--world-size 2 --engine deepspeed --reduce-gradients-every 2", ["--reduce-gradients-every 2", "deepspeed", "--zero-stage 2"]),
    ("--num-layers 0", ["--num-layers 0"]),
    ("--lr -1", ["--lr -1"]),
    ("--lr nan", ["--lr nan"]),
    ("--weight-decay -0.1", ["--weight-decay -0.1"]),
    ("--adam-beta2 1.0", ["--adam-beta2 1.0"]),
    ("--min-lr 1.0", ["--min-lr 1.0", "--lr 0.0003"]),
    ("--lr-warmup-iters 10 --train-iters 10", ["--lr-warmup-iters 10", "10"]),
    ("--use-rope-scaling --rope-scaling-high-freq-factor 1", ["1.0"]),
    (
        "--world-size 2 --tensor-model-parallel-size 2 --compile-blocks --recompute-granularity selective --recompute-modules mlp",
        ["--recompute-modules mlp", "--compile-blocks", "--tensor-model-parallel-size 2"],
    ),
    ("--attention-kernel varlen", ["varlen", "float32", "--bf16"]),
]


@pytest.mark.parametrize(("flags", "expected"), REFUSED)
def test_refused_in_one_line(flags, expected, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    argv = [word.replace("_", " ") if ":" in word else word for word in flags.split()]
    with pytest.raises(UserError) as caught:
        parse_run_config(["--dry-run", *argv])
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


ACCEPTED = [
    _405B,
    _405B + "--use-rope-scaling --max-position-embeddings 131072 --seq-length 131072 --context-parallel-size 16",
    "--world-size 8 --tensor-model-parallel-size 8 --num-query-groups 2 --vocab-size 8193",
    "--world-size 3 --tensor-model-parallel-size 3 --hidden-size 576 --num-attention-heads 9 --num-query-groups 3 --ffn-hidden-size 1536",
    _PP2 + "--pipeline-schedule zero-bubble --num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-vp-stage 5",
    _PP2 + "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3",
    _PP2 + "--engine deepspeed --optimizer-cpu-offload",
    "--engine deepspeed --zero-stage 3 --world-size 2",
    "--world-size 2 --global-batch-size 8 --reduce-gradients-every 3",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--context-parallel-size 2 --world-size 2 --seq-length 1004",
]


@pytest.mark.parametrize("flags", ACCEPTED)
def test_accepted(flags, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parse_run_config(["--dry-run", *flags.split()])


def test_a_real_run_needs_steps_data_and_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError) as caught:
        parse_run_config(["--load", str(tmp_path / "none"), "--data-path", "1.0", str(tmp_path / "text")])
    assert str(caught.value).splitlines() == [
        "--train-iters 0: give the number of optimizer steps",
        f"--data-path {tmp_path}/text: no file {tmp_path}/text.bin",
        f"--load {tmp_path}/none: no such folder",
    ]
    for suffix in ("bin", "idx"):
        (tmp_path / f"text.{suffix}").touch()
    save = str(tmp_path / "new")
    ready = ["--train-iters", "3", "--data-path", str(tmp_path / "text"), "--save", save, "--load", save, "--save-interval", "5"]
    assert parse_run_config(ready).checkpoint.load == save
    with pytest.raises(UserError, match="cannot be combined"):
        parse_run_config([*ready, "--train-data-path", str(tmp_path / "text")])
    with pytest.raises(UserError, match="no data"):
        parse_run_config(["--train-iters", "3"])
