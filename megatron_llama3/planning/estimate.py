"""What follows from a config before anything runs: the banner of every run, and all that a dry run prints.

    python -m megatron_llama3.recipes.pretrain --dry-run --world-size 16384 <flags>

Pure arithmetic: imports no torch, makes no process group.
"""

from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.config.presets import preset_name
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import Phase, phases, tokens_after
from megatron_llama3.model.counts import flops_per_token, parameter_count
from megatron_llama3.parallel.schedule import bubble_ratio
from megatron_llama3.planning.fit import changes_that_fit, spare_bytes
from megatron_llama3.planning.memory import KINDS, Peak, microbatches_of, peak_memory, timeline_of

GIB = 2**30
_MOST_ACTIONS_TO_SIMULATE = 50_000
_TENSORS_LISTED = 6


def describe(config: RunConfig) -> str:
    """Several lines: model, layout, pipeline, each phase of the ramps with its FLOPs, bubble and bytes a rank, and the run's length."""
    lines = [*_model(config), *_layout(config), *_pipeline(config)]
    for phase in phases(config):
        lines += _phase(config, phase)
    return "\n".join([*lines, *_run(config)])


def _line(title: str, text: str) -> str:
    return f"{title:<11}{text}"


def _model(config: RunConfig) -> list[str]:
    m = config.model
    name = preset_name(m) or "a model of its own"
    tied = "" if m.untie_embeddings_and_output_weights else ", tied embeddings"
    scaling = f" scaled by {m.rope_scaling_factor:g}" if m.use_rope_scaling else ""
    return [
        _line("model", f"{name}: {parameter_count(m):,} parameters{tied}"),
        _line(
            "",
            f"{m.num_layers} layers of width {m.hidden_size:,} and {m.ffn_hidden_size:,}, {m.num_attention_heads} heads over "
            f"{m.num_query_groups} KV heads, vocabulary {m.vocab_size:,}, RoPE theta {m.rotary_base:,}{scaling}",
        ),
    ]


def _layout(config: RunConfig) -> list[str]:
    p, o = config.parallel, config.optimizer
    sizes = {
        "TP": p.tensor_model_parallel_size,
        "CP": p.context_parallel_size,
        "PP": p.pipeline_model_parallel_size,
        "DP": p.data_parallel_size,
    }
    degrees = " x ".join(f"{name} {size:,}" for name, size in sizes.items())
    engine = p.engine if p.engine == "fsdp" else f"deepspeed ZeRO-{p.zero_stage}" + ", optimizer on the CPU" * p.optimizer_cpu_offload
    recompute = {None: "no recomputation", "selective": f"{' and '.join(p.recompute_modules)} recomputed"}.get(p.recompute_granularity)
    recompute = recompute or f"layers recomputed ({p.recompute_method} {p.recompute_num_layers})"
    parts = [
        f"{p.world_size:,} rank{'s' * (p.world_size > 1)} = {degrees}",
        "sequence parallel" if p.sequence_parallel else "",
        engine,
        f"{o.compute_dtype} with {o.main_dtype} master weights" if o.compute_dtype != o.main_dtype else o.compute_dtype,
        recompute,
        "compiled blocks" if p.compile_blocks else "",
    ]
    return [_line("layout", ", ".join(part for part in parts if part))]


def _pipeline(config: RunConfig) -> list[str]:
    p = config.parallel
    if p.pipeline_model_parallel_size == 1:
        return []
    chunks = layers_of_chunks(config.model, p)
    contents = [_contents(len(c.layers), c.has_embedding, c.has_output) for c in chunks]
    runs: list[list] = []
    for content in contents:
        if runs and runs[-1][1] == content:
            runs[-1][0] += 1
        else:
            runs.append([1, content])
    listed = ", ".join(f"{count} x {content}" if count > 1 else content for count, content in runs[:9])
    interleaved = f" interleaved, V {p.chunks_per_rank}, N {_group_size(config)}" if p.chunks_per_rank > 1 else ""
    return [_line("pipeline", f"{p.pipeline_schedule}{interleaved}; {len(chunks)} chunks: {listed}{', ...' * (len(runs) > 9)}")]


def _group_size(config: RunConfig) -> int:
    return config.parallel.microbatch_group_size_per_vp_stage or config.parallel.pipeline_model_parallel_size


def _contents(layers: int, has_embedding: bool, has_output: bool) -> str:
    parts = ["embedding"] * has_embedding + [f"{layers} layer{'s' * (layers > 1)}"] * (layers > 0) + ["output"] * has_output
    return " + ".join(parts)


def _phase(config: RunConfig, phase: Phase) -> list[str]:
    p, full = config.parallel, flops_per_token(config.model, phase.seq_length, causal=False)
    causal, microbatches = flops_per_token(config.model, phase.seq_length, causal=True), microbatches_of(config, phase)
    peak = peak_memory(config, phase)
    lines = [
        _line(
            f"from {_count(phase.start)}",
            f"{phase.global_batch_size:,} sequences of {phase.seq_length:,} = {phase.tokens_per_step:,} tokens a step; "
            f"{microbatches:,} micro-batch{'es' * (microbatches != 1)} of {config.training.micro_batch_size} "
            f"on each of {p.data_parallel_size:,} DP ranks",
        ),
        _line("", f"FLOPs a token: {causal:.4g} with causal attention, {full:.4g} with full; a step: {causal * phase.tokens_per_step:.4g}"),
    ]
    if p.pipeline_model_parallel_size > 1:
        lines.append(_line("", _bubble(config, microbatches)))
    return [*lines, *_memory(config, peak), *_fit(config, phase, peak)]


def _bubble(config: RunConfig, microbatches: int) -> str:
    p = config.parallel
    stages, chunks = p.pipeline_model_parallel_size, p.chunks_per_rank
    formula = (stages - 1) / (chunks * microbatches)
    text = f"bubble ratio (PP - 1) / (V x M) = {stages - 1} / ({chunks} x {microbatches:,}) = {formula:.4f}"
    if 2 * stages * chunks * microbatches > _MOST_ACTIONS_TO_SIMULATE:
        return text
    return f"{text}; the schedule itself: {bubble_ratio(timeline_of(config, microbatches)):.4f}"


def _memory(config: RunConfig, peak: Peak) -> list[str]:
    """The fullest moment of the rank that needs most, by kind and by tensor."""
    where = f"rank of pipeline stage {peak.stage}" if config.parallel.pipeline_model_parallel_size > 1 else "rank"
    kinds = ", ".join(f"{kind} {peak.of(kind) / GIB:.2f}" for kind in KINDS)
    tensors = ", ".join(f"{name} {size / GIB:.2f}" for name, size in peak.largest(_TENSORS_LISTED))
    return [
        _line("", f"GiB a {where}, fullest in the {peak.moment}: {kinds}; in all {peak.total / GIB:.2f}"),
        _line("", f"of these {tensors}"),
    ]


def _fit(config: RunConfig, phase: Phase, peak: Peak) -> list[str]:
    p, spare = config.parallel, spare_bytes(config, peak.total)
    device = f"a GPU of {p.device_memory_gib:g} GiB less {p.device_memory_reserve_gib:g} in reserve"
    if spare >= 0:
        return [_line("", f"fits {device}: {spare / GIB:.2f} GiB to spare")]
    lines = [_line("", f"does not fit {device}: {-spare / GIB:.2f} GiB too much")]
    found = changes_that_fit(config, phase)
    lines += [_line("", f"would fit with {change.flags}: {change.spare / GIB:.2f} GiB to spare") for change in found]
    return lines if found else [*lines, _line("", "no change of recomputation, or of one degree of parallelism by two, makes it fit")]


def _run(config: RunConfig) -> list[str]:
    steps = config.training.train_iters
    if steps == 0:
        return []
    tokens = tokens_after(config, steps)
    total = sum(flops_per_token(config.model, phase.seq_length, causal=True) * seen for phase, seen in _tokens_by_phase(config, tokens))
    return [_line("run", f"{steps:,} steps, {tokens:,} tokens, {total:.4g} FLOPs")]


def _tokens_by_phase(config: RunConfig, tokens: int) -> list[tuple[Phase, int]]:
    plan = phases(config)
    ends = [*(p.start for p in plan[1:]), tokens]
    return [(phase, max(0, min(end, tokens) - phase.start)) for phase, end in zip(plan, ends)]


def _count(tokens: int) -> str:
    """252,000,000 -> 252M."""
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.6g}{suffix}"
    return str(tokens)
