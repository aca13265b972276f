"""A run made small enough for a laptop, under a layout of given sizes: what matters for the layout stays as it is."""

import math
from copy import deepcopy
from dataclasses import replace

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig, layers_of_chunks
from megatron_llama3.config.run import RunConfig


def small_run(config: RunConfig, axes: dict[str, int], microbatches: int) -> RunConfig:
    """`config` with the sizes of TP, CP, PP and DP in `axes` and so many micro-batches."""
    small = RunConfig(dry_run=True)
    small.parallel = _small_parallel(config, axes)
    small.model = _small_model(config, small.parallel)
    if small.parallel.recompute_num_layers:
        small.parallel.recompute_num_layers = min(small.parallel.recompute_num_layers, 2, small.model.num_layers)
    small.data.seq_length = 2 * math.lcm(24, axes["tp"] * axes["cp"])  # CP, TP and sequence parallelism divide it
    for name in ("document_mask", "reset_position_ids", "loss_across_documents"):
        setattr(small.data, name, getattr(config.data, name))
    # Every step of a trial has the peak learning rate.
    constant = {"lr": min(config.optimizer.lr, 2e-4), "min_lr": 0.0, "lr_warmup_iters": 0, "lr_decay_iters": None}
    small.optimizer = replace(config.optimizer, **constant, clip_grad=min(config.optimizer.clip_grad, 0.3))
    small.training.attention_kernel = "reference" if config.training.attention_kernel == "reference" else "sdpa"
    small.training.micro_batch_size = min(config.training.micro_batch_size, 2)
    small.training.global_batch_size = microbatches * small.training.micro_batch_size * axes["dp"]
    small.training.loss_chunk_size = 20
    if small.parallel.reduce_gradients_every:
        several = microbatches > 1 and axes["dp"] * axes["cp"] > 1
        small.parallel.reduce_gradients_every = min(small.parallel.reduce_gradients_every, microbatches - 1) if several else None
    small.validate()
    return small


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
    return replace(
        model,
        num_layers=_number_of_layers(config, small),
        hidden_size=48,
        ffn_hidden_size=24 * tp,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=8,
        vocab_size=24 * tp if divides else 24 * tp + 1,
        max_position_embeddings=ModelConfig.max_position_embeddings,
        rotary_base=500,
        **({"rope_scaling_original_max_position_embeddings": 32} if model.use_rope_scaling else {}),
    )


def _number_of_layers(config: RunConfig, p: ParallelConfig) -> int:
    stages, chunks = p.pipeline_model_parallel_size, p.chunks_per_rank
    if stages == 1:
        return 2
    ends = [getattr(p, f"decoder_{end}_pipeline_num_layers") for end in ("first", "last")]
    if any(ends):
        return sum(end or 2 * chunks for end in ends) + (stages - 2) * 2 * chunks
    lengths = [len(c.layers) for c in layers_of_chunks(config.model, config.parallel)]
    several = max(lengths) > 1 or stages * chunks - accounted(p) < 1
    return stages * chunks * (2 if several else 1) - accounted(p)


def accounted(p: ParallelConfig) -> int:
    """How many of embedding and loss take a layer's place in the split."""
    return p.account_for_embedding_in_pipeline_split + p.account_for_loss_in_pipeline_split
