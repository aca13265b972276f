"""How a run is cut over ranks: degrees of tensor, context, pipeline and data parallelism."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    context_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    world_size: int = 1
    pipeline_schedule: str = "1f1b"  # or "zero-bubble"; several chunks a rank make either one interleaved
    num_virtual_stages_per_pipeline_rank: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    microbatch_group_size_per_vp_stage: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    engine: str = "fsdp"  # or "deepspeed"
    zero_stage: int = 1  # DeepSpeed's
    optimizer_cpu_offload: bool = False
    recompute_granularity: str | None = None  # "full" or "selective"
    recompute_method: str | None = None  # "uniform" or "block"
    recompute_num_layers: int | None = None
    compile_blocks: bool = False

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
