"""Refusals: a layout or schedule that cannot work is named before torch is imported, in one line with the two numbers that clash."""

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from megatron_llama3.config import schedules
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.fields import field_specs
from megatron_llama3.config.parallel import RECOMPUTE_MODULES, ParallelConfig, layers_of_chunks

if TYPE_CHECKING:
    from megatron_llama3.config.run import RunConfig


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(config: "RunConfig", given_seq_length: bool = True) -> None:
    """Fills in what follows from other fields: V from layers a chunk, and the batch size and sequence length that a schedule ends with.

    `given_seq_length` is False where the user left --seq-length at its default. What cannot be derived is left for `validate` to refuse.
    """
    _resolve_virtual_stages(config)
    _resolve_sequence_parallel(config)
    try:
        batches, lengths = schedules.batch_size_steps(config), schedules.seq_length_steps(config)
    except UserError:
        return
    if not given_seq_length:
        config.data.seq_length = max(length for _, length in lengths)
    largest = max(size for _, size in batches)
    if config.training.global_batch_size is None and largest > 0:
        config.training.global_batch_size = largest
    if config.training.train_samples and not config.training.train_iters and largest > 0:
        config.training.train_iters = schedules.iterations_of(config, config.training.train_samples)


def _resolve_sequence_parallel(config: "RunConfig") -> None:
    """As Megatron-LM does: its command lines carry the flag whatever TP is."""
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        config.parallel.sequence_parallel = False
        config.notices.append("without effect here: --sequence-parallel (--tensor-model-parallel-size is 1)")


def _resolve_virtual_stages(config: "RunConfig") -> None:
    parallel = config.parallel
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    uneven = parallel.decoder_first_pipeline_num_layers or parallel.decoder_last_pipeline_num_layers
    stages = parallel.pipeline_model_parallel_size
    if not per_chunk or per_chunk < 1 or stages < 2 or uneven or parallel.num_virtual_stages_per_pipeline_rank is not None:
        return
    if _layers_to_split(config) % (stages * per_chunk) == 0:
        parallel.num_virtual_stages_per_pipeline_rank = _layers_to_split(config) // (stages * per_chunk)
        parallel.num_layers_per_virtual_pipeline_stage = None


def _layers_to_split(config: "RunConfig") -> int:
    parallel = config.parallel
    return config.model.num_layers + parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split


def validate(config: "RunConfig") -> None:
    """Raises UserError, one line for each thing that is wrong. Files are looked at only if this is no dry run."""
    found = list(refusals(config))
    if not found and not config.dry_run:
        found = list(missing_inputs(config))
    if found:
        raise UserError("\n".join(found))


def refusals(config: "RunConfig") -> Iterator[str]:
    """Every reason why this run cannot work, from numbers alone."""
    out_of_range = list(_out_of_range(config))
    yield from out_of_range
    if out_of_range:
        return  # the checks below divide by these
    yield from _without_effect(config)
    yield from _model(config)
    yield from _tensor_parallel(config)
    yield from _pipeline(config)
    yield from _recompute(config)
    yield from _engine_and_dtype(config)
    yield from _schedules(config)
    yield from _gradient_reduction(config)
    yield from _optimizer(config)
    yield from _logging(config)


def _out_of_range(config: "RunConfig") -> Iterator[str]:
    for spec in field_specs(type(config)):
        value = getattr(getattr(config, spec.group), spec.name)
        if spec.type not in (int, float) or value is None:
            continue
        for number in value if spec.is_list else [value]:
            if not math.isfinite(number):
                yield f"{spec.flag} {number}: must be a finite number"
            elif number < 0 or (number == 0 and not spec.zero_ok and not spec.is_list):
                yield f"{spec.flag} {number}: must be {'0 or more' if spec.zero_ok or spec.is_list else 'above 0'}"


def _without_effect(config: "RunConfig") -> Iterator[str]:
    for spec in field_specs(type(config)):
        group = getattr(config, spec.group)
        value = getattr(group, spec.name)
        if spec.needs is not None and value != spec.default and not getattr(group, spec.needs):
            yield f"{spec.flag} {value} has no effect without {flag(spec.needs)}"
    c = config.checkpoint
    if c.save is None:
        for name in ("save_interval", "keep_last", "keep_every", "auto_resume", "overwrite_save"):
            if getattr(c, name):
                value = "" if getattr(c, name) is True else f" {getattr(c, name)}"
                yield f"{flag(name)}{value} is given, but no --save folder"


def _model(config: "RunConfig") -> Iterator[str]:
    model = config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads {model.num_attention_heads}"
    elif model.head_dim % 2:
        yield f"a head of {model.head_dim} channels (of --hidden-size {model.hidden_size}): RoPE turns pairs and needs an even number"
    if model.num_attention_heads % model.num_query_groups:
        yield f"--num-attention-heads {model.num_attention_heads} is not divisible by --num-query-groups {model.num_query_groups}"
    if model.use_rope_scaling and model.rope_scaling_high_freq_factor <= model.rope_scaling_low_freq_factor:
        yield (
            f"--rope-scaling-high-freq-factor {model.rope_scaling_high_freq_factor} must be above "
            f"--rope-scaling-low-freq-factor {model.rope_scaling_low_freq_factor}"
        )


def _tensor_parallel(config: "RunConfig") -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    size = f"--tensor-model-parallel-size {tp}"
    if parallel.world_size % parallel.model_parallel_size:
        degrees = f"{tp} x {parallel.pipeline_model_parallel_size} x {parallel.context_parallel_size}"
        advice = ": a dry run needs --world-size, a run its launcher" if parallel.world_size == 1 else ""
        yield f"world size {parallel.world_size} is not divisible by TP x PP x CP = {degrees} = {parallel.model_parallel_size}{advice}"
    if model.num_attention_heads % tp:
        yield f"--num-attention-heads {model.num_attention_heads} is not divisible by {size}"
    if model.num_query_groups % tp and tp % model.num_query_groups:
        yield f"--num-query-groups {model.num_query_groups} neither divides nor is divisible by {size}"
    if model.ffn_hidden_size % tp:
        yield f"--ffn-hidden-size {model.ffn_hidden_size} is not divisible by {size}"
    rows = -(-model.vocab_size // tp)
    if rows * (tp - 1) >= model.vocab_size:
        yield f"--vocab-size {model.vocab_size} leaves a rank of {size} without a row: {tp - 1} ranks of {rows} rows hold them all"
    if parallel.sequence_parallel and tp == 1:
        yield f"--sequence-parallel shards over TP, but --tensor-model-parallel-size is {tp}: leave it out"


def _pipeline(config: "RunConfig") -> Iterator[str]:
    parallel = config.parallel
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.chunks_per_rank
    size = f"--pipeline-model-parallel-size {pp}"
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    accounted = parallel.account_for_embedding_in_pipeline_split or parallel.account_for_loss_in_pipeline_split
    if pp == 1:
        for name in (
            "num_virtual_stages_per_pipeline_rank",
            "num_layers_per_virtual_pipeline_stage",
            "microbatch_group_size_per_vp_stage",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
        ):
            value = getattr(parallel, name)
            if value is not None and (name, value) != ("num_virtual_stages_per_pipeline_rank", 1):
                yield f"{flag(name)} {value} needs a pipeline, but {size}"
        if parallel.pipeline_schedule != "1f1b":
            yield f"--pipeline-schedule {parallel.pipeline_schedule} needs a pipeline, but {size}"
        if accounted:
            yield f"--account-for-embedding/loss-in-pipeline-split needs a pipeline, but {size}"
        return
    if accounted and (first is not None or last is not None):
        yield f"--decoder-first/last-pipeline-num-layers {first}/{last} clash with --account-for-embedding/loss-in-pipeline-split"
        return
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None:
        yield _layers_per_chunk(config, per_chunk)
        return
    try:
        layers_of_chunks(config.model, parallel)
    except UserError as error:
        yield f"{size}: {error}"
    if chunks == 1 and parallel.microbatch_group_size_per_vp_stage is not None:
        yield (
            f"--microbatch-group-size-per-vp-stage {parallel.microbatch_group_size_per_vp_stage} needs several chunks a rank, but "
            f"--num-virtual-stages-per-pipeline-rank is {chunks}"
        )


def _layers_per_chunk(config: "RunConfig", per_chunk: int) -> str:
    """Why --num-layers-per-virtual-pipeline-stage could not be turned into V."""
    parallel = config.parallel
    given = f"--num-layers-per-virtual-pipeline-stage {per_chunk}"
    if parallel.num_virtual_stages_per_pipeline_rank is not None:
        return f"{given} and --num-virtual-stages-per-pipeline-rank {parallel.num_virtual_stages_per_pipeline_rank}: give one"
    uneven = parallel.decoder_first_pipeline_num_layers or parallel.decoder_last_pipeline_num_layers
    if uneven:
        return f"{given} cannot be combined with uneven stages of {uneven} layers: give --num-virtual-stages-per-pipeline-rank"
    stages = parallel.pipeline_model_parallel_size
    return f"{_layers_to_split(config)} layers are not divisible by --pipeline-model-parallel-size {stages} x {given}"


def _recompute(config: "RunConfig") -> Iterator[str]:
    parallel = config.parallel
    granularity, method, layers = parallel.recompute_granularity, parallel.recompute_method, parallel.recompute_num_layers
    if granularity == "full" and (method is None or layers is None):
        yield f"--recompute-granularity full needs --recompute-method (is {method}) and --recompute-num-layers (is {layers})"
    if granularity != "full" and (method is not None or layers is not None):
        yield f"--recompute-method {method} and --recompute-num-layers {layers} need --recompute-granularity full, which is {granularity}"
    if layers is not None and layers > config.model.num_layers:
        yield f"--recompute-num-layers {layers} is above --num-layers {config.model.num_layers}"
    yield from _recompute_modules(parallel)
    if parallel.pipeline_schedule == "zero-bubble":
        if granularity == "full":
            yield f"--pipeline-schedule zero-bubble would recompute twice with --recompute-granularity {granularity}: leave one out"
        if parallel.compile_blocks:
            yield "--pipeline-schedule zero-bubble cannot run with --compile-blocks: a compiled backward cannot be split in two halves"


def _recompute_modules(parallel: ParallelConfig) -> Iterator[str]:
    granularity, modules = parallel.recompute_granularity, parallel.recompute_modules
    given = f"--recompute-modules {' '.join(modules)}"
    if modules and granularity != "selective":
        yield f"{given} needs --recompute-granularity selective, which is {granularity}"
    elif granularity == "selective" and not modules:
        yield (
            "--recompute-granularity selective needs --recompute-modules layernorm and/or mlp: core_attn, which is Megatron-LM's default, "
            "saves nothing here, as no attention kernel keeps its scores"
        )
    for name in modules:
        if name not in RECOMPUTE_MODULES:
            why = "no attention kernel keeps its scores" if name == "core_attn" else "Llama 3 has no such part"
            yield f"{given}: {name} saves nothing here, as {why}: give {' and/or '.join(RECOMPUTE_MODULES)}"
    if "mlp" in modules and parallel.compile_blocks and parallel.tensor_model_parallel_size > 1:
        size = f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}"
        yield f"{given} cannot run with --compile-blocks under {size}: leave out mlp or --compile-blocks"


def _engine_and_dtype(config: "RunConfig") -> Iterator[str]:
    parallel, optimizer = config.parallel, config.optimizer
    if optimizer.bf16 and optimizer.fp64:
        yield "--bf16 and --fp64 are both given: choose one"
    if config.training.attention_kernel == "varlen" and not optimizer.bf16:
        yield f"--attention-kernel varlen computes in bfloat16 and this run in {optimizer.compute_dtype}: add --bf16, or use auto or sdpa"
    if parallel.zero_stage not in (1, 2, 3):
        yield f"--zero-stage {parallel.zero_stage}: choose 1, 2 or 3"
    if parallel.engine != "deepspeed":
        if parallel.optimizer_cpu_offload:
            yield f"--optimizer-cpu-offload needs --engine deepspeed, but --engine is {parallel.engine}"
        if parallel.zero_stage != 1:
            yield f"--zero-stage {parallel.zero_stage} needs --engine deepspeed, but --engine is {parallel.engine}"
        return
    stages = parallel.pipeline_model_parallel_size
    if parallel.zero_stage in (2, 3) and stages > 1:
        yield f"--zero-stage {parallel.zero_stage} cannot run with --pipeline-model-parallel-size {stages}: use --zero-stage 1"
    if parallel.zero_stage == 3 and parallel.compile_blocks:
        yield "--zero-stage 3 cannot run with --compile-blocks: compiled code reads weights before its hooks gather them"
    if optimizer.fp64:
        yield "--engine deepspeed cannot run with --fp64: use --engine fsdp"


def _gradient_reduction(config: "RunConfig") -> Iterator[str]:
    """--reduce-gradients-every where it would change nothing."""
    parallel, every = config.parallel, config.parallel.reduce_gradients_every
    if every is None:
        return
    given = f"--reduce-gradients-every {every}"
    dp, cp = parallel.data_parallel_size, parallel.context_parallel_size
    if parallel.engine != "fsdp":
        yield f"{given} needs --engine fsdp, but --engine is {parallel.engine}: use --zero-stage 2, which reduces after each micro-batch"
    elif dp * cp == 1:
        yield f"{given} needs several ranks to reduce over, but DP x CP = {dp} x {cp}: leave it out"
    elif dp and config.training.global_batch_size is not None:
        microbatches = config.training.global_batch_size // (config.training.micro_batch_size * dp)
        if microbatches <= every:
            yield f"{given} is not below the {microbatches} micro-batches of a step, so it would reduce once a step as ever: leave it out"


def _schedules(config: "RunConfig") -> Iterator[str]:
    try:
        batches, lengths = schedules.batch_size_steps(config), schedules.seq_length_steps(config)
    except UserError as error:
        yield str(error)
        return
    yield from _largest(config.training.global_batch_size, batches, "--global-batch-size", "--step-batch-size-schedule")
    yield from _largest(config.data.seq_length, lengths, "--seq-length", "--seq-length-schedule")
    dp = config.parallel.data_parallel_size
    per_pass = config.training.micro_batch_size * dp
    for size in dict.fromkeys(size for _, size in batches):
        if dp and size % per_pass:
            yield f"global batch size {size} is not divisible by micro-batch x DP = {config.training.micro_batch_size} x {dp} = {per_pass}"
    for length in dict.fromkeys(length for _, length in lengths):
        yield from _seq_length(config, length)


def _largest(given: int | None, steps: list[tuple[int, int]], name: str, schedule: str) -> Iterator[str]:
    largest = max(value for _, value in steps)
    if given is not None and given != largest:
        yield f"{name} {given} differs from {largest}, the largest of {schedule}: leave it out"


def _seq_length(config: "RunConfig", length: int) -> Iterator[str]:
    parallel = config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    given = f"sequence length {length} of {'--seq-length-schedule' if config.data.seq_length_schedule else '--seq-length'}"
    if length > config.model.max_position_embeddings:
        yield f"{given} is above --max-position-embeddings {config.model.max_position_embeddings}"
    if cp > 1 and length % (2 * cp):
        yield f"{given} is not divisible by 2 x CP = 2 x {cp} = {2 * cp}"
    elif parallel.sequence_parallel and length // cp % tp:
        yield f"{given}: {length} / CP {cp} = {length // cp} is not divisible by TP {tp}, as --sequence-parallel needs"


def _optimizer(config: "RunConfig") -> Iterator[str]:
    optimizer = config.optimizer
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(optimizer, name) >= 1:
            yield f"{flag(name)} {getattr(optimizer, name)}: must be below 1"
    if optimizer.min_lr > optimizer.lr:
        yield f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}"
    yield from _samples(config)
    yield from _stable_and_decay(config)
    decay = optimizer.lr_decay_iters or config.training.train_iters
    if decay and optimizer.lr_decay_style != "constant" and optimizer.lr_warmup_iters >= decay:
        yield f"--lr-warmup-iters {optimizer.lr_warmup_iters} leaves nothing of --lr-decay-iters {decay}"


def _samples(config: "RunConfig") -> Iterator[str]:
    """A run is told in steps or in sequences, its learning rate in the same."""
    training, optimizer = config.training, config.optimizer
    if training.train_samples is None:
        for name in ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"):
            if getattr(optimizer, name):
                yield f"{flag(name)} {getattr(optimizer, name)} needs --train-samples: give {flag(name).replace('samples', 'iters')}"
        return
    for name in ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters"):
        if getattr(optimizer, name):
            yield f"{flag(name)} {getattr(optimizer, name)} with --train-samples: give {flag(name).replace('iters', 'samples')}"
    try:
        steps = schedules.iterations_of(config, training.train_samples)
    except (UserError, ZeroDivisionError):
        return  # what is wrong with the schedule or the batch has its own line
    if steps == 0:
        first = schedules.phases(config)[0].global_batch_size
        yield f"--train-samples {training.train_samples} are less than the first step's {first} sequences"
    elif training.train_iters != steps:
        yield f"--train-iters {training.train_iters} and --train-samples {training.train_samples}, which are {steps} steps: give one"
    decay = optimizer.lr_decay_samples or training.train_samples
    if optimizer.lr_decay_style != "constant" and optimizer.lr_warmup_samples >= decay:
        yield f"--lr-warmup-samples {optimizer.lr_warmup_samples} leaves nothing of --lr-decay-samples {decay}"


def _stable_and_decay(config: "RunConfig") -> Iterator[str]:
    o, by_steps = config.optimizer, config.training.train_samples is None
    decay = o.lr_wsd_decay_iters or o.lr_wsd_decay_samples
    name = "--lr-wsd-decay-iters" if by_steps else "--lr-wsd-decay-samples"
    if o.lr_decay_style != "WSD":
        if decay is not None or o.lr_wsd_decay_style != "exponential":
            yield f"{name} {decay} and --lr-wsd-decay-style {o.lr_wsd_decay_style} need --lr-decay-style WSD, which is {o.lr_decay_style}"
        return
    if decay is None:
        yield f"--lr-decay-style WSD needs {name}: over how many of the last the rate falls"
        return
    warmup = o.lr_warmup_iters if by_steps else o.lr_warmup_samples
    end = o.lr_decay_iters or config.training.train_iters if by_steps else o.lr_decay_samples or config.training.train_samples
    if end and warmup + decay > end:
        yield f"{name} {decay} and the warm-up of {warmup} are more than the {end} of the whole schedule"


def _logging(config: "RunConfig") -> Iterator[str]:
    log = config.logging
    if log.profile and log.profile_step_end <= log.profile_step_start:
        yield f"--profile-step-end {log.profile_step_end} does not come after --profile-step-start {log.profile_step_start}"
    for rank in log.profile_ranks if log.profile else []:
        if rank >= config.parallel.world_size:
            yield f"--profile-ranks {rank}: there are {config.parallel.world_size} ranks, counted from 0"
    if log.sample_interval is not None and not log.sample_prompts:
        yield f"--sample-interval {log.sample_interval} needs --sample-prompts TEXT ...: what the texts begin with"
    if log.sample_interval is not None and config.data.tokenizer_model is None:
        yield f"--sample-interval {log.sample_interval} needs --tokenizer-model, to read the prompts and write the texts"
    for name in ("profile", "record_memory_history"):
        if getattr(log, name) and log.log_dir is None and config.checkpoint.save is None:
            yield f"{flag(name)} writes into --log-dir or --save: give one"


def missing_inputs(config: "RunConfig") -> Iterator[str]:
    """What a run needs beyond numbers: steps to do, and data files that are there."""
    data = config.data
    if config.training.train_iters == 0 and config.training.train_samples is None:
        yield "--train-iters 0: give the number of optimizer steps"
    if data.data_path and (data.train_data_path or data.valid_data_path):
        yield "--data-path cannot be combined with --train-data-path or --valid-data-path: give one or the other"
    if not data.data_path and not data.train_data_path:
        yield "no data: give --data-path PREFIX, or --train-data-path and --valid-data-path"
    if data.train_data_path and not data.valid_data_path and config.training.eval_iters:
        yield f"--train-data-path is given and --eval-iters is {config.training.eval_iters}: give --valid-data-path too, or --eval-iters 0"
    for name in ("data_path", "train_data_path", "valid_data_path"):
        yield from _missing_datasets(flag(name), getattr(data, name))
    if data.tokenizer_model is not None and not os.path.exists(data.tokenizer_model):
        yield f"--tokenizer-model {data.tokenizer_model}: no such file or folder"
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        yield f"--wandb-project {config.logging.wandb_project}: wandb is not installed: pip install wandb"
    if config.logging.tensorboard_dir is not None and find_spec("tensorboard") is None:
        yield f"--tensorboard-dir {config.logging.tensorboard_dir}: tensorboard is not installed: pip install tensorboard"
    if config.parallel.engine == "deepspeed" and find_spec("deepspeed") is None:
        yield "--engine deepspeed: it is not installed: pip install deepspeed"
    yield from _checkpoint(config)


def _checkpoint(config: "RunConfig") -> Iterator[str]:
    c = config.checkpoint
    if c.overwrite_save and c.auto_resume:
        yield "--overwrite-save deletes what --auto-resume would go on from: give one"
    if c.load is not None and c.load_hf is not None and not c.auto_resume:
        yield f"--load {c.load} and --load-hf {c.load_hf}: give one (with --auto-resume, --load-hf serves where --load is empty)"
    # With --auto-resume what the run once started from may be gone by now.
    if c.load is not None and c.load != c.save and not c.auto_resume and not os.path.isdir(c.load):
        yield f"--load {c.load}: no such folder"
    if c.load_hf is not None and not c.auto_resume and not os.path.isdir(c.load_hf):
        yield f"--load-hf {c.load_hf}: no such folder"
    if c.finetune and c.load is None and c.load_hf is None:
        yield "--finetune needs --load"


def _missing_datasets(name: str, entries: list[str]) -> Iterator[str]:
    """Every entry that is no weight is the prefix of a .bin and an .idx file; data/sources.py reads the weights."""
    for prefix in entries:
        missing = [prefix + suffix for suffix in (".bin", ".idx") if not os.path.isfile(prefix + suffix)]
        if missing and not _is_number(prefix):
            yield f"{name} {prefix}: no file {missing[0]}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
