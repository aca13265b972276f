"""How a run is cut over ranks: degrees of tensor, context, pipeline and data parallelism, and which layers each pipeline chunk holds."""

from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.fields import list_option, option
from megatron_llama3.config.model import ModelConfig

RECOMPUTE_MODULES = ("layernorm", "mlp")
"""Megatron-LM's names of what may be made again and saves something here."""


@dataclass(kw_only=True)
class ParallelConfig:
    tensor_model_parallel_size: int = option(1, "TP: ranks that share every matrix.")
    context_parallel_size: int = option(1, "CP: ranks that share every sequence.")
    pipeline_model_parallel_size: int = option(1, "PP: ranks that share the layers.")
    sequence_parallel: bool = option(False, "Shard activations between blocks along the sequence over TP.")
    world_size: int = option(1, "Ranks of the whole run; default WORLD_SIZE of the environment (torchrun sets it), else 1.")
    pipeline_schedule: str = option(
        "1f1b", "Order of the pipeline's work; several chunks a rank make either one interleaved.", choices=("1f1b", "zero-bubble")
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(None, "V of the paper: model chunks on each pipeline rank.")
    num_layers_per_virtual_pipeline_stage: int | None = option(None, "Layers in each model chunk; another way to say V.")
    microbatch_group_size_per_vp_stage: int | None = option(
        None,
        "N of the paper: contiguous micro-batches a chunk runs before the rank turns to its next chunk; default PP.",
        aliases=("--microbatch-group-size-per-virtual-pipeline-stage",),
    )
    decoder_first_pipeline_num_layers: int | None = option(None, "Layers on the first pipeline rank, over all its chunks; default even.")
    decoder_last_pipeline_num_layers: int | None = option(None, "Layers on the last pipeline rank, over all its chunks; default even.")
    account_for_embedding_in_pipeline_split: bool = option(False, "Count the input embedding as a layer when splitting layers over stages.")
    account_for_loss_in_pipeline_split: bool = option(
        False, "Count the output layer and loss as a layer when splitting layers over stages."
    )
    engine: str = option("fsdp", "Data-parallel engine.", choices=("fsdp", "deepspeed"))
    zero_stage: int = option(1, "DeepSpeed's ZeRO stage: 1 with TP and PP, 2 and 3 with TP only. For --engine deepspeed only.")
    reduce_gradients_every: int | None = option(
        None,
        "Micro-batches after which a chunk's gradients are reduced and only this rank's part of the sum is kept, as ZeRO-2 does: less "
        "memory, more traffic. N suits interleaved stages. Default once a step. For --engine fsdp only.",
    )
    optimizer_cpu_offload: bool = option(False, "Keep optimizer states and their step on the CPU (engine deepspeed).")
    recompute_granularity: str | None = option(
        None,
        "Activations made again in the backward pass: 'selective', what --recompute-modules names; 'full', whole layers.",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        None,
        "With 'full': 'uniform' cuts all layers of a chunk into units, 'block' recomputes only the first ones.",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(None, "With 'full': layers a unit ('uniform'), or layers recomputed in each chunk ('block').")
    recompute_modules: list[str] = field(
        **list_option("With 'selective': layernorm (both norms' outputs) and/or mlp (the feed-forward with its norm).")
    )
    compile_blocks: bool = option(False, "torch.compile each transformer block.")
    device_memory_gib: float = option(79.1, "Memory of a GPU as torch sees it (H100 of 80 GB: 79.1); a dry run says whether it suffices.")
    device_memory_reserve_gib: float = option(
        5.0, "Of that, left for what is no tensor of the step: NCCL's buffers, the CUDA context, fragmentation.", zero_ok=True
    )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.model_parallel_size

    @property
    def chunks_per_rank(self) -> int:
        """V of the paper: model chunks (virtual stages) on each pipeline rank."""
        return self.num_virtual_stages_per_pipeline_rank or 1


class ChunkLayers(NamedTuple):
    """What one model chunk holds. `layers` are global layer numbers; a chunk may have none if it holds the embedding or the output."""

    layers: list[int]
    has_embedding: bool
    has_output: bool


def layers_of_chunks(model: ModelConfig, parallel: ParallelConfig) -> list[ChunkLayers]:
    """For each global chunk c = v * PP + p (chunk v of pipeline rank p, looped placement), the layers it holds.

    The split is Megatron's: layers are even over ranks, then over a rank's chunks; an embedding or loss that is accounted for
    takes one layer's place in the first or last chunk; `decoder_{first,last}_pipeline_num_layers` set a whole rank's layers and
    leave the others even. Paper, section 3.3.2: 126 layers as 128 chunks, the first only the embedding, the last only the output.

    Raises UserError if the numbers do not divide.
    """
    layers_per_rank = _layers_per_rank(model, parallel)
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.chunks_per_rank
    for rank, count in enumerate(layers_per_rank):
        if count % chunks:
            raise UserError(f"pipeline rank {rank} has {count} layers, which do not divide into {chunks} chunks a rank (virtual stages)")
    counts = [layers_per_rank[p] // chunks for _ in range(chunks) for p in range(stages)]
    counts[0] -= parallel.account_for_embedding_in_pipeline_split
    counts[-1] -= parallel.account_for_loss_in_pipeline_split
    return _number_chunks(counts)


def _layers_per_rank(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Layers on each pipeline rank, an accounted-for embedding or loss included."""
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    extra = parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    middle_layers = model.num_layers + extra - (first or 0) - (last or 0)
    middle_ranks = stages - (first is not None) - (last is not None)
    if first is None and last is None:
        described = f"{model.num_layers} layers" + (f" + {extra} for embedding and loss" if extra else "")
    else:
        described = f"{middle_layers} layers left by the first and last pipeline rank"
    if middle_layers < 0 or (middle_layers and middle_ranks < 1):
        raise UserError(f"{model.num_layers} layers do not fit first {first or 0} + last {last or 0} layers over {stages} pipeline ranks")
    if middle_ranks and middle_layers % middle_ranks:
        raise UserError(f"{described} do not divide over {middle_ranks} pipeline ranks")
    middle = [middle_layers // middle_ranks] * middle_ranks if middle_ranks else []
    return [first] * (first is not None) + middle + [last] * (last is not None)


def _number_chunks(counts: list[int]) -> list[ChunkLayers]:
    result, next_layer = [], 0
    for chunk, count in enumerate(counts):
        has_embedding, has_output = chunk == 0, chunk == len(counts) - 1
        if count < 0 or (count == 0 and not (has_embedding or has_output)):
            raise UserError(
                f"pipeline chunk {chunk} of {len(counts)} would be left with {max(count, 0)} layers: use fewer stages or virtual stages"
            )
        result.append(ChunkLayers(list(range(next_layer, next_layer + count)), has_embedding, has_output))
        next_layer += count
    return result
