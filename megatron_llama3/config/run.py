"""RunConfig: everything a run is, in one object that can be printed, stored and read back."""

from dataclasses import dataclass, field

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig


@dataclass(kw_only=True)
class DataConfig:
    data_path: list[str] = field(default_factory=list)  # Megatron's form: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...
    train_data_path: list[str] = field(default_factory=list)
    valid_data_path: list[str] = field(default_factory=list)
    split: str = "969,30,1"
    seq_length: int = 1024
    seq_length_schedule: str | None = None  # "0:4096 252M:8192", thresholds in tokens
    reset_position_ids: bool = False
    document_mask: bool = True
    loss_across_documents: bool = False
    tokenizer_model: str | None = None
    data_cache_path: str | None = None


@dataclass(kw_only=True)
class OptimizerConfig:
    lr: float = 3e-4
    min_lr: float = 0.0
    lr_decay_style: str = "cosine"  # "cosine", "linear", "constant"
    lr_decay_iters: int | None = None
    lr_warmup_iters: int = 0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    bf16: bool = False
    fp64: bool = False

    @property
    def compute_dtype(self) -> str:
        """Name of the torch dtype of weights and activations in the forward pass."""
        return "bfloat16" if self.bf16 else "float64" if self.fp64 else "float32"

    @property
    def main_dtype(self) -> str:
        """Name of the torch dtype of master weights, gradient accumulation and optimizer state."""
        return "float64" if self.fp64 else "float32"


@dataclass(kw_only=True)
class TrainingConfig:
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    step_batch_size_schedule: str | None = None  # Megatron's form: "0:1024 252M:1024 2.87T:2048", sequences by token threshold
    train_iters: int = 0
    eval_interval: int = 1000
    eval_iters: int = 100
    seed: int = 1234
    attention_kernel: str = "auto"  # "auto", "sdpa", "flex", "varlen", "reference"
    loss_chunk_size: int = 1024  # tokens whose logits are held at a time
    exit_interval: int | None = None
    exit_duration_in_mins: float | None = None
    exit_signal_handler: bool = False
    distributed_timeout_minutes: float = 10.0


@dataclass(kw_only=True)
class CheckpointConfig:
    save: str | None = None
    load: str | None = None
    save_interval: int | None = None
    finetune: bool = False
    no_load_optim: bool = False
    no_load_rng: bool = False
    override_opt_param_scheduler: bool = False
    no_async_save: bool = False


@dataclass(kw_only=True)
class LoggingConfig:
    log_interval: int = 1
    log_dir: str | None = None  # JSONL and plot data; default: the save folder
    wandb_project: str | None = None
    wandb_exp_name: str | None = None
    wandb_save_dir: str | None = None
    wandb_mode: str = "offline"


@dataclass(kw_only=True)
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
