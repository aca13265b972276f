"""What a certificate exercised of a run's layout and what it did not, read from its trials and not from the run."""

import math
from itertools import combinations

from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.config.run import RunConfig
from megatron_llama3.planning.trials import AXES, MAX_RANKS, Trial, microbatch_classes, product_of, sizes_of_axes


def coverage(config: RunConfig, trials: list[Trial]) -> tuple[list[str], list[str]]:
    """(exercised, not exercised), in words."""
    done, missing = _axes(config, trials)
    features_tried = {feature for trial in trials for feature in features_of(trial.config)}
    for feature in features_of(config):
        (done if feature in features_tried else missing).append(feature)
    return done, missing + _out_of_reach(config)


def _axes(config: RunConfig, trials: list[Trial]) -> tuple[list[str], list[str]]:
    """An axis is exercised at its own size only; axes together are at any sizes above 1, and what has no trial at its own is named."""
    sizes, tried = sizes_of_axes(config.parallel), {axis: max(t.axes[axis] for t in trials) for axis in AXES}
    used = [axis for axis in AXES if sizes[axis] > 1]
    whole = [axis for axis in used if tried[axis] == sizes[axis]]
    done = [f"{axis.upper()} {sizes[axis]}" for axis in whole]
    missing = [f"{axis.upper()} {sizes[axis]} (tried: {tried[axis]})" for axis in used if axis not in whole]
    apart = [c for n in range(2, len(used) + 1) for c in combinations(used, n) if not any(_has(t, dict.fromkeys(c, 2)) for t in trials)]
    if len(whole) > 1 and not any(_has(t, {axis: sizes[axis] for axis in whole}) for t in trials):
        apart.append(tuple(whole))
    for together in dict.fromkeys(apart):
        processes = math.prod(tried[axis] for axis in together)
        missing.append(f"{product_of(tried, together)} together: {processes} processes, where a trial has at most {MAX_RANKS}")
    return done, missing


def _has(trial: Trial, sizes: dict[str, int]) -> bool:
    return all(trial.axes[axis] >= size for axis, size in sizes.items())


def _out_of_reach(config: RunConfig) -> list[str]:
    """What no trial can have."""
    missing = []
    kept_ratio = config.parallel.tensor_model_parallel_size // config.model.num_query_groups
    if kept_ratio > MAX_RANKS:
        missing.append(f"one KV head shared by {kept_ratio} TP ranks (tried: {MAX_RANKS})")
    kernel = config.training.attention_kernel
    if kernel in ("flex", "varlen"):
        missing.append(f"--attention-kernel {kernel}, which needs a GPU (tried: sdpa)")
    if kernel == "auto" and config.optimizer.bf16:
        missing.append("--attention-kernel auto, which is varlen on a GPU in bf16 (tried: sdpa)")
    if config.data.seq_length_schedule:
        missing.append("--seq-length-schedule: every trial has one sequence length")
    return missing


def features_of(config: RunConfig) -> list[str]:
    """What a run or a trial has, in the same words for both."""
    p, model = config.parallel, config.model
    lengths = [len(c.layers) for c in layers_of_chunks(model, p)]
    n, stages = p.microbatch_group_size_per_vp_stage, p.pipeline_model_parallel_size
    recompute = " ".join(str(x) for x in (p.recompute_granularity, p.recompute_method, *p.recompute_modules) if x)
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
        **dict.fromkeys(microbatch_classes(config), stages > 1),
        "stages that hold only the embedding or only the output": min(lengths) == 0,
        "chunks of different length": min(lengths) != max(lengths),
        f"recomputation: {recompute}": bool(recompute),
        "compiled blocks": p.compile_blocks,
        "tied embeddings": not model.untie_embeddings_and_output_weights,
        "KV heads replicated over TP": p.tensor_model_parallel_size > model.num_query_groups,
        "a vocabulary that TP does not divide": bool(model.vocab_size % p.tensor_model_parallel_size),
        "RoPE scaling": model.use_rope_scaling,
        "norms of queries and keys": model.qk_layernorm,
        "document mask": config.data.document_mask,
        "positions that start anew in each document": config.data.reset_position_ids,
        "loss across documents": config.data.loss_across_documents,
        "bf16 with float32 master weights": config.optimizer.bf16,
    }
    return [text for text, present in features.items() if present]
