"""What a Megatron-LM user's flags mean here: those that Llama 3 fixes, those without effect, those with another name, and those that do
not exist.

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

# Megatron flags that choose an implementation, or ask for what is done here in any case: accepted with a notice. None of them changes the
# model or its numbers. Flag -> why it has no effect.
_WITHOUT_EFFECT = {
    "--accumulate-allreduce-grads-in-fp32": "gradients are always accumulated and reduced in fp32",
    "--attention-backend": "--attention-kernel chooses",
    "--attention-softmax-in-fp32": "softmax is always in fp32",
    "--calculate-per-token-loss": "the loss is always the mean over all tokens of the global batch",
    "--ckpt-format": "there is one format, torch.distributed.checkpoint",
    "--ckpt-assume-constant-structure": "saving plans are made each time",
    "--ckpt-fully-parallel-load": "loading is always shared out",
    "--ckpt-fully-parallel-save": "saving is always shared out",
    "--cross-entropy-fusion-impl": "there is one loss",
    "--cross-entropy-loss-fusion": "the loss is always fused with the output layer, by chunks",
    "--data-parallel-sharding-strategy": "--engine chooses, and --zero-stage for DeepSpeed",
    "--dataloader-type": "documents are always shuffled and packed",
    "--defer-embedding-wgrad-compute": "--pipeline-schedule zero-bubble defers weight gradients",
    "--distributed-backend": "NCCL on GPUs and gloo on CPUs",
    "--empty-unused-memory-level": "the allocator keeps its memory",
    "--eod-mask-loss": "the target that leaves a document is not counted unless --loss-across-documents",
    "--exit-on-missing-checkpoint": "a --load without a checkpoint is always an error, unless it equals an empty --save",
    "--log-throughput": "throughput is always logged",
    "--make-vocab-size-divisible-by": "the vocabulary is never padded",
    "--no-async-tensor-model-parallel-allreduce": "communication overlaps where it can",
    "--no-bias-dropout-fusion": "there are no biases and no dropout",
    "--no-bias-gelu-fusion": "there are no biases",
    "--no-bias-swiglu-fusion": "there are no biases",
    "--no-create-attention-mask-in-dataloader": "the loader never makes one",
    "--no-gradient-accumulation-fusion": "the engine accumulates",
    "--no-masked-softmax-fusion": "the attention kernel has it inside",
    "--no-mmap-bin-files": "datasets are always mapped",
    "--no-persist-layer-norm": "there is one RMSNorm",
    "--no-position-embedding": "positions are always rotary",
    "--no-rope-fusion": "there is one RoPE",
    "--num-workers": "a thread reads ahead",
    "--overlap-grad-reduce": "the engine overlaps communication by itself",
    "--overlap-p2p-communication-warmup-flush": "the pipeline overlaps communication by itself",
    "--overlap-param-gather": "the engine overlaps communication by itself",
    "--reset-attention-mask": "attention stays within documents unless --no-document-mask",
    "--tensorboard-log-interval": "--log-interval says",
    "--tensorboard-queue-size": "TensorBoard's own",
    "--timing-log-level": "--profile traces everything",
    "--tokenizer-type": "the type follows from --tokenizer-model",
    "--tp-comm-overlap": "communication overlaps where it can",
    "--transformer-impl": "there is one implementation",
    "--use-dist-ckpt": "there is one format, torch.distributed.checkpoint",
    "--use-distributed-optimizer": "optimizer state is always sharded over data-parallel ranks",
    "--use-flash-attn": "--attention-kernel chooses",
    "--use-pytorch-profiler": "--profile is always torch's",
    "--use-mcore-models": "there is one model",
    "--use-megatron-fsdp": "--engine fsdp is the default",
    "--use-rotary-position-embeddings": "positions are always rotary",
    "--use-torch-fsdp2": "--engine fsdp is the default",
}

# Megatron flags whose purpose is met in another way, or that would change the model or its numbers: what to do instead.
_INSTEAD = {
    "--apply-layernorm-1p": "norm weights start at 1 and are stored as they are, which is the same model: leave it out",
    "--decoupled-lr": "every weight has the learning rate --lr: leave it out",
    "--decoupled-min-lr": "every weight has the floor --min-lr: leave it out",
    "--grad-reduce-in-bf16": "gradients are always reduced in fp32: leave it out",
    "--main-grads-dtype": "gradients are always fp32: leave it out",
    "--main-params-dtype": "master weights are always fp32: leave it out",
    "--exp-avg-dtype": "Adam's moments are always fp32: leave it out",
    "--exp-avg-sq-dtype": "Adam's moments are always fp32: leave it out",
    "--use-precision-aware-optimizer": "optimizer state is always fp32: leave it out",
    "--lr-warmup-fraction": "give --lr-warmup-iters or --lr-warmup-samples",
    "--lr-warmup-init": "the warm-up starts at 0: leave it out",
    "--start-weight-decay": "the weight decay is constant: give --weight-decay",
    "--end-weight-decay": "the weight decay is constant: give --weight-decay",
    "--weight-decay-incr-style": "the weight decay is constant: leave it out",
    "--rampup-batch-size": "give --step-batch-size-schedule, such as '0:32 10B:64'",
    "--yaml-cfg": "give --config FILE.yaml",
    "--fp16": "Llama 3 trains in bfloat16: give --bf16",
    "--recompute-activations": "give --recompute-granularity selective --recompute-modules layernorm",
    "--async-save": "saving is asynchronous unless --no-async-save",
    "--rope-type": "RoPE is Llama's, with --use-rope-scaling for 3.1's",
    "--add-position-embedding": "positions are always rotary: leave it out",
    "--add-qkv-bias": "Llama has no biases: leave it out",
    "--num-experts": "Llama 3 is dense: leave it out",
    "--mock-data": "give --data-path; scripts/quickstart.sh shows how a small dataset is made",
    "--pipeline-model-parallel-layout": "give --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
    "--virtual-pipeline-model-parallel-size": "give --num-virtual-stages-per-pipeline-rank",
    "--test-data-path": "only --train-data-path and --valid-data-path are read",
    "--vocab-file": "give --tokenizer-model",
    "--merge-file": "give --tokenizer-model",
    "--ffn-hidden-size-multiplier": "give --ffn-hidden-size",
    "--torch-compile": "give --compile-blocks",
}


def fixed_flags() -> dict[str, dict]:
    """Flag -> keyword arguments of `add_argument`."""
    return _FIXED


@cache
def megatron_flags() -> dict[str, dict]:
    """Flag -> {"type", "nargs", "choices"} of Megatron-LM; "flag" is the type of a switch."""
    return json.loads(files(__package__).joinpath("megatron_flags.json").read_text(encoding="utf-8"))


def flags_without_effect() -> dict[str, dict]:
    """Flag -> keyword arguments of `add_argument`: Megatron's own type, count and choices."""
    types = {"int": int, "float": float, "str": str}
    arguments = {}
    for name in _WITHOUT_EFFECT:
        theirs = megatron_flags()[name]
        valued = {"type": types.get(theirs["type"], str)} | {k: theirs[k] for k in ("nargs", "choices") if k in theirs}
        arguments[name] = {"action": "store_true"} if theirs["type"] == "switch" else valued
    return arguments


def notices(given: list[str]) -> list[str]:
    """One line that says which of the given flags have no effect here, and why; none if all have one."""
    listed = "; ".join(f"{name} ({_WITHOUT_EFFECT[name]})" for name in dict.fromkeys(given))
    return [f"without effect here: {listed}"] if listed else []


def explain_all(arguments: list[str], known: list[str]) -> str:
    """A line for each flag that the parser does not know, in order; a value after such a flag is the flag's."""
    flags = [a for a in dict.fromkeys(arguments) if a.startswith("--") or not any(b.startswith("--") for b in arguments)]
    return "\n".join(explain(flag, known) for flag in flags)


def explain(argument: str, known: list[str]) -> str:
    """The one line for an argument that the parser does not know: Megatron-LM's flags get their own message, others the nearest."""
    flag = argument.partition("=")[0]
    if not flag.startswith("-"):
        return f"unexpected argument '{argument}': every value follows a flag"
    if flag in _INSTEAD:
        return f"Megatron-LM's {flag} does not exist here: {_INSTEAD[flag]}"
    if flag in megatron_flags():
        return f"Megatron-LM has {flag}; megatron_llama3 does not, and it may change the model or its numbers: leave it out"
    return f"unknown flag {flag}{nearest(flag, known)}"
