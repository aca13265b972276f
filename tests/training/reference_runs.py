"""One run twice, by the command line and by the plain reference, and how far the two lie apart."""

import json
import re
import warnings
from collections import defaultdict
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.planning.plain_training import Corpus, Settings, Trainer, batches, initial_weights
from megatron_llama3.recipes.pretrain import pretrain

STEPS = 10
# Every number matters: epsilons as large as what they stand beside, clipping that bites, three kinds of RoPE frequencies, a vocabulary that
# TP does not divide, decay that ends before the run. Adam's epsilon also keeps it from blowing rounding up where a gradient is near zero.
SETTINGS = Settings(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=101,
    norm_epsilon=1e-2,
    rotary_base=500,
    init_method_std=0.1,
    untie_embeddings_and_output_weights=True,
    qk_layernorm=False,
    use_rope_scaling=True,
    rope_scaling_factor=8.0,
    rope_scaling_low_freq_factor=1.0,
    rope_scaling_high_freq_factor=4.0,
    rope_scaling_original_max_position_embeddings=32,
    document_mask=True,
    reset_position_ids=False,
    loss_across_documents=False,
    lr=1e-2,
    min_lr=2e-3,
    lr_warmup_iters=3,
    lr_decay_iters=8,
    weight_decay=0.1,
    adam_beta1=0.8,
    adam_beta2=0.9,
    adam_eps=1e-2,
    clip_grad=0.3,
    seed=7,
)
WEIGHTS, SHARE = [3, 1], 0.9
BATCH_RAMP, LENGTH_RAMP = [(0, 4), (200, 8)], [(0, 16), (500, 24)]  # steps 1-4, 5-6 and 7-10 differ
BOUNDS = {"fp64": 1e-12, "fp32": 1e-6}
MOMENTS = ("optimizer.exp_avg", "optimizer.exp_avg_sq")


class Run(NamedTuple):
    """Losses, gradient norms and rates of each step, of each second one also the norms of the parts (embedding, layers, ...); weights and
    Adam's moments after the last, by the names of a checkpoint."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    parts: dict[str, list[float]]
    tensors: dict[str, Tensor]


def run_reference(settings: Settings, data: list[str]) -> Run:
    trainer = Trainer(settings)
    corpora = [Corpus(prefix, SHARE, settings.seed, max(length for _, length in LENGTH_RAMP)) for prefix in data]
    steps, parts = [], defaultdict(list)
    for number, batch in enumerate(islice(batches(corpora, WEIGHTS, BATCH_RAMP, LENGTH_RAMP, settings), STEPS), 1):
        steps.append(trainer.step(batch))
        for part, norm in _norms_of_parts(trainer.gradients).items() if number % 2 == 0 else ():
            parts[part].append(norm)
    losses, norms, rates = zip(*steps)
    kinds = {"model": trainer.weights, "optimizer.exp_avg": trainer.first, "optimizer.exp_avg_sq": trainer.second}
    return Run(losses, norms, rates, parts, {f"{kind}.{name}": t for kind, tensors in kinds.items() for name, t in tensors.items()})


def _norms_of_parts(gradients: dict[str, Tensor]) -> dict[str, float]:
    squares: dict[str, float] = defaultdict(float)
    for name, gradient in gradients.items():
        squares[re.match(r"layers\.\d+|\w+", name)[0]] += float(gradient.square().sum())
    return {part: square**0.5 for part, square in squares.items()}


def flags_of(settings: Settings, data: list[str]) -> list[str]:
    flags = []
    for name, value in asdict(settings).items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    for flag, ramp in (("--step-batch-size-schedule", BATCH_RAMP), ("--seq-length-schedule", LENGTH_RAMP)):
        flags += [flag, " ".join(f"{tokens}:{value}" for tokens, value in ramp)]
    for weight, prefix in zip(WEIGHTS, data):
        flags += [*(["--data-path"] if prefix is data[0] else []), str(weight), prefix]
    flags += ["--layer-norms-interval", "2", "--split", "9,1,0", "--eval-iters", "0"]
    return [*flags, "--train-iters", str(STEPS), "--micro-batch-size", "2"]


def run_command_line(settings: Settings, data: list[str], folder: Path, layout: str, ranks: int, before=lambda: None) -> Run:
    run_ranks(ranks, _rank, [*flags_of(settings, data), *layout.split(), "--save", str(folder)], before)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = {key.removeprefix("gradient_norm/"): [] for r in records for key in r if key.startswith("gradient_norm/")}
    for record in records:
        for part in parts if "gradient_norm/norm" in record else ():
            parts[part].append(record[f"gradient_norm/{part}"])
    records = [r for r in records if "loss" in r]
    shapes = {name: tuple(w.shape) for name, w in initial_weights(settings).items()}
    dtype = torch.float64 if "--fp64" in layout else torch.float32
    tensors = {f"{kind}.{name}": torch.empty(shape, dtype=dtype) for kind in ("model", *MOMENTS) for name, shape in shapes.items()}
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load(tensors, checkpoint_id=folder / f"iter_{STEPS:07}", no_dist=True)
    return Run(*([r[key] for r in records] for key in ("loss", "gradient_norm", "lr")), parts, tensors)


def _rank(flags: list[str], before) -> None:
    before()
    assert pretrain(parse_run_config(flags)) == 0


def deviations(found: Run, expected: Run) -> dict[str, float]:
    """The largest of each kind: numbers relative, tensors relative to their norm."""
    result = {}
    for kind in ("losses", "norms", "rates"):
        ours, theirs = (np.array(getattr(run, kind)) for run in (found, expected))
        result[kind] = float(np.max(np.abs(ours - theirs) / theirs))
    assert found.parts.keys() == expected.parts.keys()
    apart = [np.array(found.parts[part]) / np.array(norms) - 1 for part, norms in expected.parts.items()]
    result["parts"] = float(np.max(np.abs(apart)))
    for kind in ("model", *MOMENTS):
        names = [name for name in expected.tensors if name.startswith(f"{kind}.")]
        result[kind] = max(relative_error(found.tensors[name], expected.tensors[name]) for name in names)
    return result


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def ratios(found: Run, expected: Run, dtype: str) -> dict[str, float]:
    """By how many times each kind exceeds its bound; moments, which are sums of gradients, may be twice as far off in fp32."""
    return {kind: x / BOUNDS[dtype] / (1 + (dtype == "fp32" and kind in MOMENTS)) for kind, x in deviations(found, expected).items()}


class PlainAdamOp:
    """In place of the operator of DeepSpeed's CPU Adam, which g++ builds in minutes: the same calls, AdamW in plain torch."""

    def create_adam(self, *args) -> None: ...

    def destroy_adam(self, number: int) -> None: ...

    def adam_update(self, number, step, lr, beta1, beta2, eps, weight_decay, bias_correction, weight, gradient, first, second) -> None:
        assert bias_correction
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight.mul_(1 - lr * weight_decay)
        weight.addcdiv_(first / (1 - beta1**step), (second / (1 - beta2**step)).sqrt() + eps, value=-lr)


def use_plain_adam_op() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder.load = lambda self, verbose=False: PlainAdamOp()
