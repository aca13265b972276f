"""A certificate for the layout of one run: the run's model made small, its layout kept, trained on gloo ranks of this machine and compared
with one process.

Each axis above 1 stays at 2 or more, and every set of axes that fits on 8 processes is tried together. Schedule, V, N against PP, M against
PP, uneven and empty stages, engine, recomputation, tied embeddings, dtype and the ratio of KV heads to TP are kept. What the certificate
calls exercised is read from the trials, not from the run. Where spmd-types is installed, the model of each trial is typed by mesh axis too
(mesh_types.py).
"""

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import combinations

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig, layers_of_chunks
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import batch_size_steps
from megatron_llama3.planning.equivalence import BOUNDS, compare, one_process, train_under
from megatron_llama3.planning.local_ranks import RankFailedError

MAX_RANKS = 8
STEPS = 5
AXES = ("tp", "cp", "pp", "dp")


@dataclass
class Trial:
    """One small run: `axes` are its sizes of TP, CP, PP and DP, `microbatches` is its M."""

    config: RunConfig
    axes: dict[str, int]
    microbatches: int


@dataclass
class Result:
    trial: Trial
    dtype: str
    values: dict[str, float]
    bounds: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(self.values[kind] <= bound for kind, bound in self.bounds.items())


@dataclass
class Certificate:
    config: RunConfig
    results: list[Result] = field(default_factory=list)
    exercised: list[str] = field(default_factory=list)
    not_exercised: list[str] = field(default_factory=list)
    type_errors: list[str] | None = None
    """of the trials' models; None where they were not typed"""

    @property
    def verdict(self) -> str:
        if self.type_errors or not all(result.passed for result in self.results):
            return "FAILED"
        return "PARTIAL" if self.not_exercised else "PASSED"


def certify(config: RunConfig, progress=lambda text: None) -> Certificate:
    """Runs every trial of `config`'s layout in full precision and, for a bf16 run, in bf16."""
    certificate = Certificate(config)
    trials = make_trials(config)
    if find_spec("spmd_types"):
        certificate.type_errors = [error for trial in trials for error in type_errors(trial)]
    exact = "fp32" if config.parallel.engine == "deepspeed" else "fp64"
    own = "bf16" if config.optimizer.bf16 else "fp64" if config.optimizer.fp64 else "fp32"
    for trial in trials:
        for dtype in dict.fromkeys((exact, own)):
            progress(f"{describe(trial)} in {dtype}")
            try:
                certificate.results.append(run_trial(trial, dtype))
            except RankFailedError as error:
                progress(f"did not finish: {str(error).strip().splitlines()[-1]}")
                certificate.results.append(Result(trial, dtype, {"did not finish": math.inf}, {"did not finish": 0.0}))
    _list_features(certificate, trials)
    return certificate


def type_errors(trial: Trial) -> list[str]:
    """What of the trial's model does not type: nothing, or the first error and where it was found."""
    from megatron_llama3.planning.mesh_types import check_types  # spmd-types, which only tests and certificates use

    try:
        check_types(trial.config)
    except RankFailedError as error:
        return [f"{describe(trial)}: {next(line for line in str(error).splitlines() if 'Error: ' in line)}"]
    return []


def run_trial(trial: Trial, dtype: str) -> Result:
    config = _in_dtype(trial.config, dtype)
    alone = train_under(one_process(config), STEPS)
    found = train_under(config, STEPS)
    if dtype != "bf16":
        difference = compare(found, alone)
        return Result(trial, dtype, vars(difference), BOUNDS[dtype])
    fp32 = train_under(one_process(_in_dtype(trial.config, "fp32")), STEPS)
    ours, theirs = compare(found, fp32), compare(alone, fp32)
    kinds = ("loss_rms", "all_gradients", "gradient")
    return Result(trial, dtype, vars(ours), {kind: 2 * vars(theirs)[kind] for kind in kinds} | {"copies": 0.0})


def make_trials(config: RunConfig) -> list[Trial]:
    """One trial for each set of axes that fits and is part of no larger one; one more for each way in which M stands to PP in the ramp."""
    *others, last = _microbatch_classes(config)
    trials = [_trial(config, axes, last) for axes in _axes_to_try(config, last)]
    if config.parallel.pipeline_model_parallel_size > 1:
        trials += [_trial(config, next(a for a in _axes_to_try(config, other) if a["pp"] > 1), other) for other in others]
    return trials


def _axes_to_try(config: RunConfig, microbatch_class: str) -> list[dict[str, int]]:
    """The sizes of the axes, for each set of axes that fits and is part of no larger one."""
    p = config.parallel
    pp = _small_pp(config, microbatch_class)
    sizes = {"tp": _small_tp(config), "cp": min(p.context_parallel_size, 2), "pp": pp, "dp": min(p.data_parallel_size, 2)}
    used = [axis for axis in AXES if sizes[axis] > 1]
    fitting = [c for n in range(len(used), -1, -1) for c in combinations(used, n) if math.prod(sizes[a] for a in c) <= MAX_RANKS]
    choices = [chosen for chosen in fitting if not any(set(chosen) < set(other) for other in fitting)]
    return [{a: sizes[a] if a in chosen else 1 for a in AXES} for chosen in choices]


def _small_tp(config: RunConfig) -> int:
    """2, or as many ranks as share one KV head where that is more."""
    tp, kv = config.parallel.tensor_model_parallel_size, config.model.num_query_groups
    return 1 if tp == 1 else min(max(2, tp // kv), MAX_RANKS)


def _small_pp(config: RunConfig, microbatch_class: str) -> int:
    """2, or 3 where the first or last rank differs from those between them, or M is to lie between 1 and PP."""
    p = config.parallel
    uneven = p.decoder_first_pipeline_num_layers or p.decoder_last_pipeline_num_layers or (_accounted(p) and p.chunks_per_rank == 1)
    return min(p.pipeline_model_parallel_size, 3 if uneven or microbatch_class == "M < PP" else 2)


def _accounted(p: ParallelConfig) -> int:
    return p.account_for_embedding_in_pipeline_split + p.account_for_loss_in_pipeline_split


def _microbatch_classes(config: RunConfig) -> list[str]:
    """How M stands to PP in each phase of the batch ramp, without repetition, the last phase last."""
    p, per_pass = config.parallel, config.training.micro_batch_size * config.parallel.data_parallel_size
    classes = []
    for _, size in batch_size_steps(config):
        m, pp = size // per_pass, p.pipeline_model_parallel_size
        classes.append("M = 1" if m == 1 else "M < PP" if m < pp else "M a multiple of PP" if m % pp == 0 else "M no multiple of PP")
    return list(dict.fromkeys(reversed(classes)))[::-1]


def _trial(config: RunConfig, axes: dict[str, int], microbatch_class: str) -> Trial:
    pp = axes["pp"]
    # A trial without the pipeline keeps the number of micro-batches above 1 if the run has it.
    m = {"M = 1": 1, "M < PP": max(pp - 1, 1), "M a multiple of PP": 2 * pp, "M no multiple of PP": 2 * pp + 1}[microbatch_class]
    small = RunConfig(dry_run=True)
    small.parallel = _small_parallel(config, axes)
    small.model = _small_model(config, small.parallel)
    if small.parallel.recompute_num_layers:
        small.parallel.recompute_num_layers = min(small.parallel.recompute_num_layers, 2, small.model.num_layers)
    small.data.seq_length = 2 * math.lcm(24, axes["tp"])  # CP, TP and sequence parallelism divide it
    for name in ("document_mask", "reset_position_ids", "loss_across_documents"):
        setattr(small.data, name, getattr(config.data, name))
    # Every step of a trial has the peak learning rate.
    constant = {"lr": min(config.optimizer.lr, 2e-4), "min_lr": 0.0, "lr_warmup_iters": 0, "lr_decay_iters": None}
    small.optimizer = replace(config.optimizer, **constant, clip_grad=min(config.optimizer.clip_grad, 0.3))
    small.training.attention_kernel = "reference" if config.training.attention_kernel == "reference" else "sdpa"
    small.training.micro_batch_size = min(config.training.micro_batch_size, 2)
    small.training.global_batch_size = m * small.training.micro_batch_size * axes["dp"]
    small.training.loss_chunk_size = 20
    if small.parallel.reduce_gradients_every:
        several = m > 1 and axes["dp"] * axes["cp"] > 1
        small.parallel.reduce_gradients_every = min(small.parallel.reduce_gradients_every, m - 1) if several else None
    small.validate()
    return Trial(small, axes, m)


def _small_parallel(config: RunConfig, axes: dict[str, int]) -> ParallelConfig:
    p = deepcopy(config.parallel)
    p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size = axes["tp"], axes["cp"], axes["pp"]
    p.world_size = axes["tp"] * axes["cp"] * axes["pp"] * axes["dp"]
    p.sequence_parallel = p.sequence_parallel and axes["tp"] > 1
    if axes["pp"] == 1:
        return _without_pipeline(p)
    original = config.parallel
    if p.microbatch_group_size_per_vp_stage is not None:
        n, pp = original.microbatch_group_size_per_vp_stage, original.pipeline_model_parallel_size
        p.microbatch_group_size_per_vp_stage = axes["pp"] + (n > pp) - (n < pp)
    for end in ("first", "last"):
        name = f"decoder_{end}_pipeline_num_layers"
        if getattr(original, name) is not None:
            setattr(p, name, _weight_of_end(config, end) * p.chunks_per_rank)
    return p


def _without_pipeline(p: ParallelConfig) -> ParallelConfig:
    plain = ParallelConfig()
    kept = ("num_virtual_stages_per_pipeline_rank", "microbatch_group_size_per_vp_stage", "pipeline_schedule")
    ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    accounted = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    return replace(p, **{name: getattr(plain, name) for name in (*kept, *ends, *accounted)})


def _weight_of_end(config: RunConfig, end: str) -> int:
    """Layers a chunk of the first or last rank: 1, 2 or 3 where the ranks between have 2."""
    ranks = _layers_of_ranks(config)
    own, neighbour = ranks[:2] if end == "first" else ranks[:-3:-1]
    return 2 + (own > neighbour) - (own < neighbour)


def _layers_of_ranks(config: RunConfig) -> list[int]:
    stages = config.parallel.pipeline_model_parallel_size
    chunks = layers_of_chunks(config.model, config.parallel)
    return [sum(len(c.layers) for c in chunks[rank::stages]) for rank in range(stages)]


def _small_model(config: RunConfig, small: ParallelConfig) -> ModelConfig:
    model, tp = config.model, small.tensor_model_parallel_size
    original_tp = config.parallel.tensor_model_parallel_size
    per_rank = min(max(model.num_query_groups // original_tp, 1), 2)
    kv_heads = max(1, tp // max(1, original_tp // model.num_query_groups)) * per_rank
    heads = kv_heads * max(2 if model.num_attention_heads > model.num_query_groups else 1, -(-tp // kv_heads))
    divides = model.vocab_size % original_tp == 0
    return ModelConfig(
        num_layers=_number_of_layers(config, small),
        hidden_size=48,
        ffn_hidden_size=24 * tp,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=8,
        vocab_size=24 * tp if divides else 24 * tp + 1,
        norm_epsilon=model.norm_epsilon,
        rotary_base=500,
        use_rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        rope_scaling_original_max_position_embeddings=32,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
    )


def _number_of_layers(config: RunConfig, p: ParallelConfig) -> int:
    stages, chunks = p.pipeline_model_parallel_size, p.chunks_per_rank
    if stages == 1:
        return 2
    ends = [getattr(p, f"decoder_{end}_pipeline_num_layers") for end in ("first", "last")]
    if any(ends):
        return sum(end or 2 * chunks for end in ends) + (stages - 2) * 2 * chunks
    lengths = [len(c.layers) for c in layers_of_chunks(config.model, config.parallel)]
    several = max(lengths) > 1 or stages * chunks - _accounted(p) < 1
    return stages * chunks * (2 if several else 1) - _accounted(p)


def _in_dtype(config: RunConfig, dtype: str) -> RunConfig:
    config = deepcopy(config)
    config.optimizer.fp64, config.optimizer.bf16 = dtype == "fp64", dtype == "bf16"
    return config


def describe(trial: Trial) -> str:
    axes = _product(trial.axes, [axis for axis in AXES if trial.axes[axis] > 1])
    return f"{axes or 'one process'}, M {trial.microbatches}"


def _product(sizes: dict[str, int], axes: Iterable[str]) -> str:
    return " x ".join(f"{axis.upper()} {sizes[axis]}" for axis in axes)


def _list_features(certificate: Certificate, trials: list[Trial]) -> None:
    config, p = certificate.config, certificate.config.parallel
    done, missing = certificate.exercised, certificate.not_exercised
    sizes = dict(zip(AXES, (p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size, p.data_parallel_size)))
    tried = {axis: max(t.axes[axis] for t in trials) for axis in AXES}
    used = [axis for axis in AXES if sizes[axis] > 1]
    done += [f"{axis.upper()} (the run: {sizes[axis]}, tried: {tried[axis]})" for axis in used]
    for together in (c for n in range(2, len(used) + 1) for c in combinations(used, n)):
        if not any(all(t.axes[axis] > 1 for axis in together) for t in trials):
            processes = math.prod(tried[axis] for axis in together)
            missing.append(f"{_product(tried, together)} together: {processes} processes, where a trial has at most {MAX_RANKS}")
    features_tried = {feature for trial in trials for feature in _features(trial.config)}
    for feature in _features(config):
        (done if feature in features_tried else missing).append(feature)
    kept_ratio = p.tensor_model_parallel_size // config.model.num_query_groups
    if kept_ratio > MAX_RANKS:
        missing.append(f"one KV head shared by {kept_ratio} TP ranks (tried: {MAX_RANKS})")
    kernel = config.training.attention_kernel
    if kernel in ("flex", "varlen"):
        missing.append(f"--attention-kernel {kernel}, which needs a GPU (tried: sdpa)")
    if kernel == "auto" and config.optimizer.bf16:
        missing.append("--attention-kernel auto, which is varlen on a GPU in bf16 (tried: sdpa)")
    if config.data.seq_length_schedule:
        missing.append("--seq-length-schedule: every trial has one sequence length")


def _features(config: RunConfig) -> list[str]:
    """What a run or a trial has, in the same words for both."""
    p, model = config.parallel, config.model
    lengths = [len(c.layers) for c in layers_of_chunks(model, p)]
    n, stages = p.microbatch_group_size_per_vp_stage, p.pipeline_model_parallel_size
    recompute = " ".join(str(x) for x in (p.recompute_granularity, p.recompute_method) if x)
    features = {
        f"engine {p.engine}" + (f", ZeRO-{p.zero_stage}" if p.engine == "deepspeed" else ""): True,
        "optimizer offload": p.optimizer_cpu_offload,
        "gradients reduced several times a step": p.reduce_gradients_every is not None,
        "sequence parallelism": p.sequence_parallel,
        f"schedule {p.pipeline_schedule}": stages > 1,
        f"V = {p.chunks_per_rank} chunks a rank": p.chunks_per_rank > 1,
        "N below PP": n is not None and n < stages,
        "N equal to PP": n is not None and n == stages,
        "N above PP": n is not None and n > stages,
        **dict.fromkeys(_microbatch_classes(config), stages > 1),
        "stages that hold only the embedding or only the output": min(lengths) == 0,
        "chunks of different length": min(lengths) != max(lengths),
        f"recomputation: {recompute}": bool(recompute),
        "compiled blocks": p.compile_blocks,
        "tied embeddings": not model.untie_embeddings_and_output_weights,
        "KV heads replicated over TP": p.tensor_model_parallel_size > model.num_query_groups,
        "a vocabulary that TP does not divide": bool(model.vocab_size % p.tensor_model_parallel_size),
        "RoPE scaling": model.use_rope_scaling,
        "document mask": config.data.document_mask,
        "positions that start anew in each document": config.data.reset_position_ids,
        "loss across documents": config.data.loss_across_documents,
        "bf16 with float32 master weights": config.optimizer.bf16,
    }
    return [text for text, present in features.items() if present]


def _judged(value: float, bound: float) -> str:
    return "ok" if value <= bound else "BROKEN"


def _typed(certificate: Certificate) -> list[str]:
    if certificate.type_errors is None:
        return ["Measured only: with `pip install spmd-types==0.3.1` the sums of gradients over TP and CP are typed too."]
    if certificate.type_errors:
        return ["Does not type by mesh axis:", *(f"- {error}" for error in certificate.type_errors)]
    return ["Typed and measured: for any values, each gradient is summed over TP and CP where it must be and nowhere else."]


def as_markdown(certificate: Certificate, flags: list[str]) -> str:
    rows = [
        f"| {describe(r.trial)} | {r.dtype} | {kind} | {r.values[kind]:.1e} | {bound:.1e} | {_judged(r.values[kind], bound)} |"
        for r in certificate.results
        for kind, bound in r.bounds.items()
    ]
    lines = [
        f"# Layout certificate: {certificate.verdict}",
        "",
        f"Flags: `{' '.join(flags)}`",
        "",
        f"Each trial trains a small model for {STEPS} steps on forked gloo ranks and compares every number with one process.",
        "In bf16 the bound is twice the error of one bf16 process against fp32.",
        "",
        "| trial | dtype | quantity | deviation | bound | |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *_typed(certificate),
        "",
        "Exercised:",
        *(f"- {text}" for text in certificate.exercised),
        "",
        "Not exercised:",
        *(f"- {text}" for text in certificate.not_exercised or ["nothing that these flags ask for"]),
        "",
        "Outside of any certificate: the true sizes, GPU kernels, NCCL and the network.",
    ]
    return "\n".join(lines) + "\n"
