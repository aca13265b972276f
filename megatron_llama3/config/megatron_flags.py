"""What a Megatron-LM user's flags mean here: those that Llama 3 fixes, those with another name, and those that do not exist.

`megatron_flags.json` lists Megatron-LM's flags with their types, from megatron/training/arguments.py and the config dataclasses
that it generates flags from.
"""

import json
from functools import cache
from importlib.resources import files

from megatron_llama3.config.names import nearest

# Same name, meaning and type as Megatron's, but Llama 3 leaves only one value: accepted with it, refused with any other.
_FIXED: dict[str, dict] = {
    "--swiglu": {"action": "store_true", "help": "The feed-forward is always SwiGLU."},
    "--group-query-attention": {"action": "store_true", "help": "Attention always has --num-query-groups key/value heads."},
    "--disable-bias-linear": {"action": "store_true", "help": "No linear layer has a bias."},
    "--normalization": {"choices": ["RMSNorm"]},
    "--position-embedding-type": {"choices": ["rope"]},
    "--rotary-percent": {"type": float, "choices": [1.0]},
    "--attention-dropout": {"type": float, "choices": [0.0]},
    "--hidden-dropout": {"type": float, "choices": [0.0]},
    "--optimizer": {"choices": ["adam"], "help": "AdamW, as Megatron's adam is with its decoupled weight decay."},
}

# Megatron flags whose purpose is met in another way: what to do instead.
_INSTEAD = {
    "--train-samples": "give --train-iters",
    "--lr-decay-samples": "give --lr-decay-iters",
    "--lr-warmup-samples": "give --lr-warmup-iters",
    "--lr-warmup-fraction": "give --lr-warmup-iters",
    "--rampup-batch-size": "give --step-batch-size-schedule",
    "--yaml-cfg": "give --config FILE.yaml",
    "--fp16": "Llama 3 trains in bfloat16: give --bf16",
    "--use-distributed-optimizer": "optimizer state is always sharded over data parallel ranks; leave it out",
    "--use-torch-fsdp2": "leave it out: --engine fsdp is the default",
    "--use-megatron-fsdp": "leave it out: --engine fsdp is the default",
    "--use-custom-fsdp": "leave it out: --engine fsdp is the default",
    "--data-parallel-sharding-strategy": "choose --engine, and for DeepSpeed --zero-stage",
    "--accumulate-allreduce-grads-in-fp32": "gradients are always accumulated and reduced in fp32; leave it out",
    "--recompute-activations": "give --recompute-granularity selective",
    "--attention-backend": "give --attention-kernel",
    "--use-flash-attn": "give --attention-kernel",
    "--async-save": "saving is asynchronous unless --no-async-save",
    "--reset-attention-mask": "attention stays within documents unless --no-document-mask",
    "--eod-mask-loss": "the target that leaves a document is not counted unless --loss-across-documents",
    "--rope-type": "RoPE is Llama's, with --use-rope-scaling for 3.1's",
    "--use-rotary-position-embeddings": "positions are always rotary; leave it out",
    "--add-position-embedding": "positions are always rotary",
    "--no-position-embedding": "positions are always rotary; leave it out",
    "--make-vocab-size-divisible-by": "the vocabulary is never padded; leave it out",
    "--transformer-impl": "there is one implementation; leave it out",
    "--use-mcore-models": "there is one model; leave it out",
    "--distributed-backend": "NCCL on GPUs and gloo on CPUs are chosen by themselves; leave it out",
    "--ckpt-format": "there is one format, torch.distributed.checkpoint; leave it out",
    "--use-dist-ckpt": "there is one format, torch.distributed.checkpoint; leave it out",
    "--overlap-grad-reduce": "the engine overlaps communication by itself; leave it out",
    "--overlap-param-gather": "the engine overlaps communication by itself; leave it out",
    "--pipeline-model-parallel-layout": "give --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
    "--virtual-pipeline-model-parallel-size": "give --num-virtual-stages-per-pipeline-rank",
    "--tensorboard-dir": "logs are JSONL in --log-dir, and W&B by --wandb-project",
    "--test-data-path": "only --train-data-path and --valid-data-path are read",
    "--tokenizer-type": "the type follows from --tokenizer-model; leave it out",
    "--vocab-file": "give --tokenizer-model",
    "--merge-file": "give --tokenizer-model",
    "--ffn-hidden-size-multiplier": "give --ffn-hidden-size",
    "--torch-compile": "give --compile-blocks",
    "--weight-decay-incr-style": "the weight decay is constant",
    "--exit-on-missing-checkpoint": "a --load without a checkpoint is always an error, unless it equals an empty --save",
    "--no-async-tensor-model-parallel-allreduce": "leave it out",
    "--no-gradient-accumulation-fusion": "leave it out",
    "--no-masked-softmax-fusion": "leave it out",
}


def fixed_flags() -> dict[str, dict]:
    """Flag -> keyword arguments of `add_argument`."""
    return _FIXED


@cache
def megatron_flags() -> dict[str, dict]:
    """Flag -> {"type", "nargs", "choices"} of Megatron-LM; "flag" is the type of a switch."""
    return json.loads(files(__package__).joinpath("megatron_flags.json").read_text(encoding="utf-8"))


def explain(argument: str, known: list[str]) -> str:
    """The one line for an argument that the parser does not know: Megatron-LM's flags get their own message, others the nearest."""
    flag = argument.partition("=")[0]
    if not flag.startswith("-"):
        return f"unexpected argument '{argument}': every value follows a flag"
    if flag in _INSTEAD:
        return f"Megatron-LM's {flag} does not exist here: {_INSTEAD[flag]}"
    if flag in megatron_flags():
        return f"Megatron-LM has {flag}; megatron_llama3 does not"
    return f"unknown flag {flag}{nearest(flag, known)}"
