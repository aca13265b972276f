"""RunConfig: everything a run is, in one object that can be printed, stored and read back."""

from dataclasses import dataclass, field

from megatron_llama3.config.fields import list_option, option
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig


@dataclass(kw_only=True)
class DataConfig:
    data_path: list[str] = field(**list_option("Indexed datasets without .bin/.idx: PREFIX ..., or WEIGHT PREFIX ...; cut by --split."))
    train_data_path: list[str] = field(**list_option("The same for training only; use with --valid-data-path instead of --data-path."))
    valid_data_path: list[str] = field(**list_option("The same for validation only."))
    split: str = option("969,30,1", "Shares of --data-path for training, validation and test.")
    seq_length: int = option(1024, "Tokens a sequence; with a schedule, its largest.")
    seq_length_schedule: str | None = option(None, "Sequence length by tokens seen: '0:4096 252M:8192' (K, M, B, T: powers of 1000).")
    reset_position_ids: bool = option(False, "Start positions at 0 in every document of a packed sequence.")
    document_mask: bool = option(True, "Keep attention within documents (paper, section 3.2).")
    loss_across_documents: bool = option(False, "Count the target that leads from a document's end to the next one's first token.")
    tokenizer_model: str | None = option(None, "Tokenizer: a tiktoken file, a tokenizer.json, or a folder with one.")
    data_cache_path: str | None = option(None, "Folder to keep shuffling indices of very large datasets in; default: made in memory.")


@dataclass(kw_only=True)
class OptimizerConfig:
    lr: float = option(3e-4, "Peak learning rate.")
    min_lr: float = option(0.0, "Floor of the learning rate.", zero_ok=True)
    lr_decay_style: str = option("cosine", "Shape of the decay after warm-up.", choices=("cosine", "linear", "constant", "WSD"))
    lr_wsd_decay_style: str = option(
        "exponential",
        "With --lr-decay-style WSD: shape of the decay at the end.",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = option(None, "With --lr-decay-style WSD: optimizer steps of the decay at the end.")
    lr_wsd_decay_samples: int | None = option(None, "The same in sequences, with --train-samples.")
    lr_decay_iters: int | None = option(None, "Optimizer steps at which the floor is reached; default --train-iters.")
    lr_decay_samples: int | None = option(None, "With --train-samples: sequences at which the floor is reached; default --train-samples.")
    lr_warmup_iters: int = option(0, "Optimizer steps of linear warm-up.", zero_ok=True)
    lr_warmup_samples: int = option(0, "With --train-samples: sequences of linear warm-up.", zero_ok=True)
    weight_decay: float = option(0.1, "AdamW's decoupled weight decay, on matrices only.", zero_ok=True)
    adam_beta1: float = option(0.9, "AdamW beta 1.", zero_ok=True)
    adam_beta2: float = option(0.95, "AdamW beta 2.", zero_ok=True)
    adam_eps: float = option(1e-8, "AdamW epsilon.")
    clip_grad: float = option(1.0, "Largest global gradient norm; 0 switches clipping off.", zero_ok=True)
    bf16: bool = option(False, "Compute in bfloat16, with fp32 master weights and gradient accumulation; default all fp32.")
    fp64: bool = option(False, "Everything in double precision, for comparing layouts.")

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
    micro_batch_size: int = option(1, "Sequences in one forward pass of one data-parallel rank.")
    global_batch_size: int | None = option(None, "Sequences a step over all ranks; default micro-batch x DP; with a schedule, its largest.")
    step_batch_size_schedule: str | None = option(
        None, "Global batch size by tokens seen, such as '0:1024 2.87T:2048' (K, M, B, T are powers of 1000)."
    )
    train_iters: int = option(0, "Optimizer steps of the whole run.", zero_ok=True)
    train_samples: int | None = option(
        None, "Sequences of the whole run, instead of --train-iters; the learning rate then goes by --lr-warmup-samples and its like."
    )
    eval_interval: int = option(1000, "Steps between evaluations on the validation split.")
    eval_iters: int = option(100, "Global batches an evaluation; 0 switches it off.", zero_ok=True)
    seed: int = option(1234, "Seed of initial weights and data order.", zero_ok=True)
    attention_kernel: str = option("auto", "Attention backend.", choices=("auto", "sdpa", "tiled", "flex", "varlen", "reference"))
    loss_chunk_size: int = option(1024, "Tokens whose logits are held at a time.")
    manual_gc: bool = option(False, "Collect Python's garbage at the same steps on every rank, and at no other time.")
    manual_gc_interval: int = option(
        0, "With --manual-gc: steps between collections; 0: only at the start.", zero_ok=True, needs="manual_gc"
    )
    exit_interval: int | None = option(None, "Save and exit when the step is divisible by this.")
    exit_duration_in_mins: int | None = option(None, "Save and exit after this many minutes.")
    exit_signal_handler: bool = option(False, "On SIGTERM or SIGUSR1 save and exit, with status 75 if steps are left to do.")
    distributed_timeout_minutes: int = option(10, "How long a collective may hang before the run stops.")
    hang_timeout_seconds: float = option(
        300.0, "Seconds without a step after which the rank that is behind is named and the run ends; 0: never.", zero_ok=True
    )
    storage_retry_minutes: float = option(
        20.0, "Minutes for which a file system that fails is tried again before the run ends with status 75; 0: not at all.", zero_ok=True
    )
    check_for_spiky_loss: bool = option(False, "Skip steps whose loss is far above the recent ones, as those that are not finite.")
    spiky_loss_factor: float = option(
        2.0, "With --check-for-spiky-loss: how many times the median of recent losses is a spike.", needs="check_for_spiky_loss"
    )
    max_skips_in_a_row: int = option(5, "Steps skipped in a row before the run goes back to its last checkpoint and on with new data.")


@dataclass(kw_only=True)
class CheckpointConfig:
    save: str | None = option(None, "Folder to write checkpoints to.")
    load: str | None = option(None, "Folder to resume from; equal to an empty --save, the run starts fresh.")
    load_hf: str | None = option(None, "Hugging Face folder to take the first weights from; the model flags must say the same model.")
    auto_resume: bool = option(
        False, "Go on from the last whole checkpoint in --save; where there is none, start as --load, --load-hf and --finetune say."
    )
    overwrite_save: bool = option(False, "Delete what --save holds of a run that this one does not go on from.")
    save_interval: int | None = option(None, "Steps between checkpoints; one is always written at the end.")
    keep_last: int | None = option(None, "Of the checkpoints in --save keep this many, deleting older ones after each save; default all.")
    keep_every: int | None = option(
        None, "Keep also those whose step is a multiple of this; alone, with the last one.", aliases=("--save-retain-interval",)
    )
    finetune: bool = option(False, "Load weights only, and start at step 0.")
    no_load_optim: bool = option(False, "Do not load optimizer state.")
    no_load_rng: bool = option(False, "Do not load random number state.")
    no_load_checksums: bool = option(False, "Do not hold what is loaded to the checksums of its manifest.")
    override_opt_param_scheduler: bool = option(
        False,
        "Take the learning-rate schedule from the flags where it differs from the checkpoint's.",
        aliases=("--override-opt_param-scheduler",),
    )
    override_data: bool = option(False, "Take data, sequence length and batch size from the flags where they differ from the checkpoint's.")
    no_async_save: bool = option(False, "Wait for each checkpoint to be on disk before going on.")


@dataclass(kw_only=True)
class LoggingConfig:
    log_interval: int = option(1, "Steps between log lines.")
    log_dir: str | None = option(None, "Folder of metrics.jsonl and events.jsonl; default the save folder.")
    layer_norms_interval: int | None = option(None, "Steps between metrics with the gradient norm of each layer; unset, there are none.")
    sample_interval: int | None = option(None, "Steps between texts that the model writes after --sample-prompts; unset, it writes none.")
    sample_prompts: list[str] = field(**list_option("With --sample-interval: beginnings of texts.", nargs="+", needs="sample_interval"))
    sample_tokens: int = option(32, "With --sample-interval: tokens of each text, a forward pass each.", needs="sample_interval")
    sample_temperature: float = option(
        0.0, "With --sample-interval: 0 takes the likeliest token, above it draws.", zero_ok=True, needs="sample_interval"
    )
    log_straggler: bool = option(False, "Measure each rank's own work and name ranks that are slow.")
    straggler_interval: int = option(50, "With --log-straggler: steps between comparisons of all ranks.", needs="log_straggler")
    straggler_factor: float = option(1.3, "With --log-straggler: how many times the median of all ranks is slow.", needs="log_straggler")
    tensorboard_dir: str | None = option(None, "Folder of TensorBoard's files; unset, none are written.")
    profile: bool = option(False, "Trace a window of steps into profile/ of the log folder (torch.profiler; opens in Perfetto).")
    profile_step_start: int = option(10, "With --profile: steps of the run before the first traced one.", needs="profile")
    profile_step_end: int = option(12, "With --profile: the last traced step.", needs="profile")
    profile_ranks: list[int] = field(
        **list_option("With --profile: the ranks that are traced (default 0).", default=(0,), nargs="+", needs="profile")
    )
    record_memory_history: bool = option(
        False, "Keep the CUDA allocator's history; written into memory/ of the log folder when the device is out of memory, and at the end."
    )
    wandb_project: str | None = option(None, "Weights & Biases project; unset, W&B is not used.")
    wandb_exp_name: str | None = option(None, "Weights & Biases run name.", needs="wandb_project")
    wandb_save_dir: str | None = option(None, "Folder of W&B's local files.", needs="wandb_project")
    wandb_mode: str = option("offline", "Whether W&B talks to its server.", choices=("offline", "online"), needs="wandb_project")


@dataclass(kw_only=True)
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    # These belong to one command, so no YAML holds them.
    dry_run: bool = False
    """check the layout, print what follows from it, and stop"""
    notices: list[str] = field(default_factory=list, compare=False)
    """lines to be said at the start: what was asked for and has no effect"""

    def validate(self) -> None:
        """Raises UserError with one line for each thing that cannot work. Imports no torch."""
        from megatron_llama3.config.validate import validate

        validate(self)
