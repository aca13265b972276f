"""Bytes on one rank by formula: weights, gradients, optimizer state, and the activations that the pipeline schedule keeps in flight.

What each layer keeps for its backward pass is read off model/llama.py, for an attention kernel that keeps no scores (paper, section
3.3.2: "a memory consumption estimator"). Neither the allocator's fragmentation nor NCCL's buffers are in it. Imports no torch.
"""

from dataclasses import astuple, dataclass

from megatron_llama3.config.parallel import ChunkLayers, layers_of_chunks
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import Phase
from megatron_llama3.model.counts import layer_parameter_count
from megatron_llama3.parallel.schedule import Timed, make_timeline

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device. `temporary` is the largest working set of one operation: logits of a chunk, or layers made again."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def timeline_of(config: RunConfig, microbatches: int) -> list[list[Timed]]:
    """The run's pipeline schedule, as training runs it."""
    p = config.parallel
    zero_bubble = p.pipeline_schedule == "zero-bubble"
    return make_timeline(p.pipeline_model_parallel_size, p.chunks_per_rank, microbatches, p.microbatch_group_size_per_vp_stage, zero_bubble)


def microbatches_of(config: RunConfig, phase: Phase) -> int:
    """M: micro-batches of one data-parallel rank in one step."""
    return phase.global_batch_size // (config.training.micro_batch_size * config.parallel.data_parallel_size)


def peak_memory(config: RunConfig, phase: Phase) -> tuple[int, RankMemory]:
    """The pipeline rank that needs most in this phase of the run, and what it needs."""
    ranks = range(config.parallel.pipeline_model_parallel_size)
    group = config.parallel.microbatch_group_size_per_vp_stage or len(ranks)
    # More micro-batches than the pipeline can hold twice over change nothing but the time this takes.
    microbatches = min(microbatches_of(config, phase), 2 * (group + len(ranks)))
    timeline = timeline_of(config, microbatches)
    return max(((rank, rank_memory(config, phase, rank, timeline[rank])) for rank in ranks), key=lambda item: item[1].total)


def rank_memory(config: RunConfig, phase: Phase, pipeline_rank: int, timeline: list[Timed]) -> RankMemory:
    """Bytes on TP rank 0 of a pipeline rank (no other TP rank has more)."""
    stages = config.parallel.pipeline_model_parallel_size
    chunks = dict(enumerate(layers_of_chunks(config.model, config.parallel)))
    own = {number: chunk for number, chunk in chunks.items() if number % stages == pipeline_rank}
    weights, gradients, optimizer = _state_bytes(config, sum(_parameters(config, chunk) for chunk in own.values()))
    if not config.model.untie_embeddings_and_output_weights and stages == 1:
        weights, gradients, optimizer = _state_bytes(config, _parameters_of_tied_whole(config, own[0]))
    kept = {number: _kept_by_chunk(config, phase, chunk) for number, chunk in own.items()}
    return RankMemory(weights, gradients, optimizer, _peak_in_flight(timeline, kept), _temporary(config, phase, own))


def _vocabulary_rows(config: RunConfig) -> int:
    return -(-config.model.vocab_size // config.parallel.tensor_model_parallel_size)


def _parameters(config: RunConfig, chunk: ChunkLayers) -> int:
    matrix = _vocabulary_rows(config) * config.model.hidden_size
    ends = chunk.has_embedding * matrix + chunk.has_output * (matrix + config.model.hidden_size)
    return len(chunk.layers) * layer_parameter_count(config.model, config.parallel.tensor_model_parallel_size) + ends


def _parameters_of_tied_whole(config: RunConfig, chunk: ChunkLayers) -> int:
    """One stage holds both users of a tied embedding, and the matrix once."""
    return _parameters(config, chunk) - _vocabulary_rows(config) * config.model.hidden_size


def _state_bytes(config: RunConfig, parameters: int) -> tuple[float, float, float]:
    """(weights for computing, gradients, master weights and Adam's moments), as the engines keep them."""
    p, compute, main = config.parallel, BYTES[config.optimizer.compute_dtype], BYTES[config.optimizer.main_dtype]
    shards = p.data_parallel_size * p.context_parallel_size
    if p.engine == "fsdp":
        if shards == 1 and compute == main:  # no FSDP: the weights are the master weights
            return parameters * main, parameters * main, parameters * 2 * main
        # Gathered weights and whole gradients live through the step; reduced gradients and states are sharded.
        return parameters * compute, parameters * main * (1 + 1 / shards), parameters * 3 * main / shards
    weights = parameters * compute / (shards if p.zero_stage == 3 else 1)
    gradients = parameters * main / (shards if p.zero_stage >= 2 else 1)
    return weights, gradients, 0 if p.optimizer_cpu_offload else parameters * 3 * main / shards


def _tokens(config: RunConfig, phase: Phase) -> int:
    """Tokens of one micro-batch on one CP rank."""
    return config.training.micro_batch_size * phase.seq_length // config.parallel.context_parallel_size


def layer_activation_bytes(config: RunConfig, tokens: int) -> int:
    """What one layer keeps for its backward pass without full recomputation. `tokens`: of a micro-batch on one CP rank."""
    m, p = config.model, config.parallel
    tp, compute = p.tensor_model_parallel_size, BYTES[config.optimizer.compute_dtype]
    between_blocks = m.hidden_size / (tp if p.sequence_parallel else 1)
    queries = m.num_attention_heads * m.head_dim / tp
    keys_values = 2 * max(m.num_query_groups / tp, 1) * m.head_dim * p.context_parallel_size  # gathered over CP
    residual = 2 * between_blocks  # inputs of both norms
    inputs = 2 * m.hidden_size  # of the column layers: gathered under sequence parallelism, and kept for their weight gradients
    attention = 2 * queries + keys_values  # queries and the kernel's result
    feed_forward = 4 * m.ffn_hidden_size / tp  # w1 x, silu of it, w3 x, their product
    log_sums = 0 if p.recompute_granularity == "selective" else 4 * m.num_attention_heads / tp
    return round(tokens * (compute * (residual + inputs + attention + feed_forward) + log_sums))


def _kept_by_chunk(config: RunConfig, phase: Phase, chunk: ChunkLayers) -> int:
    """Bytes that one micro-batch leaves in one chunk between its forward and its backward."""
    p, tokens = config.parallel, _tokens(config, phase)
    count, compute = len(chunk.layers), BYTES[config.optimizer.compute_dtype]
    boundary = tokens * compute * config.model.hidden_size // (p.tensor_model_parallel_size if p.sequence_parallel else 1)
    kept = count * layer_activation_bytes(config, tokens)
    if p.recompute_granularity == "full" and p.recompute_method == "uniform":
        kept = -(-count // p.recompute_num_layers) * boundary
    elif p.recompute_granularity == "full":
        again = min(count, p.recompute_num_layers)
        kept = again * boundary + (count - again) * layer_activation_bytes(config, tokens)
    head = boundary + tokens * (compute * config.model.hidden_size + 8) if chunk.has_output else 0
    return kept + head


def _peak_in_flight(timeline: list[Timed], kept: dict[int, int]) -> int:
    held = peak = 0
    for timed in timeline:
        kind, chunk = timed.action.kind, timed.action.chunk
        if kind == "F":
            held += kept[chunk]
        peak = max(peak, held)
        # Under zero bubble the weight half W still needs what F kept.
        if kind in ("B", "W"):
            held -= kept[chunk]
    return peak


def _temporary(config: RunConfig, phase: Phase, chunks: dict[int, ChunkLayers]) -> float:
    p, tokens = config.parallel, _tokens(config, phase)
    compute, main = BYTES[config.optimizer.compute_dtype], BYTES[config.optimizer.main_dtype]
    logits = made_again = 0
    if any(chunk.has_output for chunk in chunks.values()):
        rows = _vocabulary_rows(config)
        # One chunk of logits and their gradient in both dtypes, and the weight's gradient as it is summed over chunks.
        logits = rows * (2 * min(config.training.loss_chunk_size, tokens) * (main + compute) / 2 + main * config.model.hidden_size)
    if p.recompute_granularity == "full":
        largest = max(len(chunk.layers) for chunk in chunks.values())
        unit = p.recompute_num_layers if p.recompute_method == "uniform" else 1
        made_again = min(unit, largest) * layer_activation_bytes(config, tokens)
    return max(logits, made_again)
