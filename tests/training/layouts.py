"""The matrix of layouts: the axes, a pairwise cover of them, and the small model that is nasty on purpose.

A row is a dict of one value per axis. Rows that the config's own validation refuses do not exist.
"""

import random
from collections.abc import Callable, Iterator
from itertools import combinations

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig, layers_of_chunks
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.validate import refusals

Row = dict[str, object]

AXES: dict[str, tuple] = {
    "tp": (1, 2, 3, 4),
    "sp": (False, True),
    "cp": (1, 2, 3, 4),
    "pp": (1, 2, 3, 4),
    "dp": (1, 2, 3),
    "schedule": ("1f1b", "zero-bubble"),
    "v": (1, 2, 3),
    "n": (None, 1, 3),
    "split": ("even", "embedding", "loss", "embedding+loss", "uneven"),
    "engine": ("fsdp",),
    "recompute": (None, "full-uniform-1", "full-uniform-2", "full-block-1", "selective-layernorm", "selective-mlp"),
    "tied": (False, True),
    "kv_heads": (1, 2, 3),
    "frozen": (False, True),
    "reduce_every": (None, 1, 2),
    "micro_batch": (1, 2),
    "positions": ("packed", "reset", "no document mask"),
}
# DeepSpeed sees nothing of the pipeline, so its own cover is over fewer axes.
DEEPSPEED_AXES = AXES | {
    "n": (None,),
    "v": (1, 2),
    "split": ("even", "embedding"),
    "engine": ("deepspeed-zero-1", "deepspeed-zero-2", "deepspeed-zero-3", "deepspeed-zero-2-offload"),
    "recompute": (None, "full-uniform-1"),
    "reduce_every": (None,),
    "kv_heads": (1, 3),
    "positions": ("packed",),
}
MAX_RANKS = 8
SEQUENCES = 6  # a step: M is 6, 3, 2 or 1, which PP 2, 3 and 4 do not all divide, and which may be below PP


def config_of(row: Row, dtype: str = "fp64") -> RunConfig:
    """A model with an uneven vocabulary, heads not hidden / heads wide, all three kinds of scaled RoPE frequencies, clipping that bites."""
    config = RunConfig(dry_run=True)
    config.parallel = _parallel(row)
    config.model = ModelConfig(
        num_layers=_number_of_layers(row),
        hidden_size=48,
        ffn_hidden_size=72,
        num_attention_heads=12,
        num_query_groups=row["kv_heads"],
        kv_channels=8,
        vocab_size=103,
        rotary_base=500,
        use_rope_scaling=True,
        rope_scaling_original_max_position_embeddings=32,
        untie_embeddings_and_output_weights=not row["tied"],
        qk_layernorm=row.get("qk_norm", False),
    )
    config.data.seq_length = 48
    config.data.reset_position_ids = row["positions"] == "reset"
    config.data.document_mask = row["positions"] != "no document mask"
    config.training.micro_batch_size = row["micro_batch"]
    config.training.global_batch_size = SEQUENCES
    config.training.loss_chunk_size = 20
    config.optimizer.lr = 2e-4  # at 1e-3 rounding alone takes the 8-layer tied model apart: test_rounding_alone_stays_within_the_bounds
    config.optimizer.clip_grad = 0.3
    config.optimizer.fp64, config.optimizer.bf16 = dtype == "fp64", dtype == "bf16"
    return config


def _parallel(row: Row) -> ParallelConfig:
    granularity, method, count = (*(row["recompute"] or "--").split("-"), None, None)[:3]
    modules = [method] if granularity == "selective" else []
    engine, stage, offload = (*row["engine"].replace("-zero", "").split("-"), "1", "")[:3]
    per_rank = row["v"] if row["split"] == "uneven" else None
    return ParallelConfig(
        tensor_model_parallel_size=row["tp"],
        context_parallel_size=row["cp"],
        pipeline_model_parallel_size=row["pp"],
        world_size=row["tp"] * row["cp"] * row["pp"] * row["dp"],
        sequence_parallel=row["sp"],
        pipeline_schedule=row["schedule"],
        num_virtual_stages_per_pipeline_rank=row["v"],
        microbatch_group_size_per_vp_stage=row["n"],
        decoder_first_pipeline_num_layers=per_rank,
        decoder_last_pipeline_num_layers=per_rank and 2 * per_rank,
        account_for_embedding_in_pipeline_split="embedding" in row["split"],
        account_for_loss_in_pipeline_split="loss" in row["split"],
        engine=engine,
        reduce_gradients_every=row["reduce_every"],
        zero_stage=int(stage),
        optimizer_cpu_offload=offload == "offload",
        recompute_granularity=granularity or None,
        recompute_method=None if modules else method or None,
        recompute_modules=modules,
        recompute_num_layers=int(count) if count else None,
        compile_blocks=row.get("compile", False),
    )


def _number_of_layers(row: Row) -> int:
    """As few as the split allows: with the embedding or the loss accounted for, the first or last chunk holds nothing else if it can."""
    pp, v, split = row["pp"], row["v"], row["split"]
    if pp == 1:
        return 3
    if split == "uneven":
        return v * (pp + 1)  # v on the first rank and each middle one, 2 v on the last
    accounted = ("embedding" in split) + ("loss" in split)
    chunks = pp * v
    return max(chunks - accounted, 2 * chunks - accounted if chunks - accounted < 1 else 1)


def accepted(row: Row) -> bool:
    if row["tp"] * row["cp"] * row["pp"] * row["dp"] > MAX_RANKS:
        return False
    config = config_of(row, dtypes_of(row)[0])
    try:
        return config.model.num_layers <= 8 and not list(refusals(config)) and bool(layers_of_chunks(config.model, config.parallel))
    except UserError:
        return False


def dtypes_of(row: Row) -> tuple[str, ...]:
    """Exact engines run in fp64 first, where rounding hides nothing; DeepSpeed has no fp64."""
    return ("fp64", "fp32") if row["engine"] == "fsdp" else ("fp32",)


def trainable_of(row: Row) -> Callable[[str], bool]:
    """With `frozen`, about half of the weights are: the whole first stage unless its embedding is tied, and a part of every layer.

    DeepSpeed refuses a rank without anything to train.
    """

    whole_stage = row["engine"] == "fsdp"

    def trainable(name: str) -> bool:
        if name.startswith("tok_embeddings"):
            return row["tied"] or not whole_stage
        if name.startswith("layers.0.") and whole_stage:
            return False
        return not name.endswith(("wq.weight", "wv.weight", "w1.weight", "ffn_norm.weight"))

    return trainable if row["frozen"] else lambda name: True


def random_rows(generator: random.Random, axes: dict[str, tuple] = AXES) -> Iterator[Row]:
    """Accepted rows without end. What only a pipeline or TP can have is drawn for those alone, or hardly a row would be accepted."""
    neutral = {"schedule": "1f1b", "v": 1, "n": None, "split": "even"}
    while True:
        row = {axis: generator.choice(values) for axis, values in axes.items()}
        if row["pp"] == 1:
            row |= neutral
        row["sp"] = row["sp"] and row["tp"] > 1
        row["n"] = row["n"] if row["v"] > 1 else None
        row["reduce_every"] = row["reduce_every"] if row["dp"] * row["cp"] > 1 else None
        row["recompute"] = row["recompute"] if row["schedule"] == "1f1b" or "selective" in (row["recompute"] or "") else None
        if accepted(row):
            yield row


def pairs_of(row: Row) -> set[tuple]:
    """Every two values that the row has together."""
    return set(combinations(row.items(), 2))


def pairwise_cover(pool: list[Row], key: Callable[[Row], set[tuple]] = pairs_of) -> list[Row]:
    """Rows of `pool` that have every pair of values that any row of it has: greedily, the one with most new pairs first."""
    pairs = [key(row) for row in pool]
    missing = set().union(*pairs)
    cover = []
    while missing:
        best = max(range(len(pool)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        cover.append(pool[best])
    return cover


def matrix(axes: dict[str, tuple] = AXES, seed: int = 0, pool: int = 4000) -> list[Row]:
    rows = random_rows(random.Random(seed), axes)
    return pairwise_cover([next(rows) for _ in range(pool)])


def name_of(row: Row) -> str:
    """A short test id: the axes that are not at their first value."""
    return " ".join(f"{axis}={value}" for axis, value in row.items() if axis not in AXES or value != AXES[axis][0]) or "one process"
