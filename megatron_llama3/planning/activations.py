"""What a layer, the embedding and the output keep between forward and backward, tensor by tensor, and what their passes need beside it.

Read off model/ and parallel/tensor_parallel.py, for a fused norm (keeps its input and 1 / rms) and an attention kernel that keeps no
scores. All sizes are bytes on one rank for one micro-batch. Imports no torch.

Shapes: s = sequence on this CP rank (of the whole sequence / CP), b = micro-batch, h = hidden size, f = feed-forward size, t = TP.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from megatron_llama3.config.parallel import ChunkLayers
from megatron_llama3.config.run import RunConfig

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
INT64 = 8


@dataclass(frozen=True)
class Sizes:
    """Bytes of the shapes that come again and again."""

    gathered: int
    """[s, b, h]"""
    between: int
    """[s/t, b, h] with sequence parallelism, else [s, b, h]: the activation between blocks"""
    queries: int
    """[s, b, heads/t, d]"""
    keys: int
    """[s, b, KV heads/t, d], at least one head; as many for the values"""
    wide: int
    """[s, b, f/t]"""
    inverse_rms: int
    """1 / rms of a norm, in at least float32"""
    log_sums: int
    """[b, heads/t, s] of the attention kernel, in at least float32"""


def sizes(config: RunConfig, tokens: int) -> Sizes:
    """`tokens`: s x b, of one micro-batch on one CP rank."""
    m, tp = config.model, config.parallel.tensor_model_parallel_size
    compute, full = BYTES[config.optimizer.compute_dtype], BYTES[config.optimizer.main_dtype]
    cut = tp if config.parallel.sequence_parallel else 1
    return Sizes(
        gathered=tokens * m.hidden_size * compute,
        between=tokens * m.hidden_size * compute // cut,
        queries=tokens * m.num_attention_heads * m.head_dim * compute // tp,
        keys=tokens * max(m.num_query_groups // tp, 1) * m.head_dim * compute,
        wide=tokens * m.ffn_hidden_size * compute // tp,
        inverse_rms=tokens * full // cut,
        log_sums=tokens * m.num_attention_heads * full // tp,
    )


MADE_AGAIN = {
    "layernorm": ("attention_norm.output", "ffn_norm.output"),
    "mlp": ("ffn_norm.inverse_rms", "ffn_norm.output", "feed_forward.w1x", "feed_forward.w3x"),
}
"""What is not kept where `--recompute-modules` names a module."""


def kept_by_layer(config: RunConfig, tokens: int) -> dict[str, int]:
    """Tensor name -> bytes that one layer keeps for its backward pass where it is not recomputed as a whole."""
    made_again = {name for module in config.parallel.recompute_modules for name in MADE_AGAIN[module]}
    return {name: size for name, size in tensors_of_layer(config, tokens).items() if name not in made_again}


def made_again_by_layer(config: RunConfig, tokens: int) -> dict[str, int]:
    """Tensor name -> bytes that a layer's backward pass makes again before it begins, and frees as if they had been kept."""
    modules = config.parallel.recompute_modules
    dropped = MADE_AGAIN["layernorm"] if "layernorm" in modules else ()  # made again for each product alone
    names = [name for name in MADE_AGAIN["mlp"] if name not in dropped] if "mlp" in modules else []
    return {name: size for name, size in tensors_of_layer(config, tokens).items() if name in names}


def tensors_of_layer(config: RunConfig, tokens: int) -> dict[str, int]:
    """Tensor name -> bytes of everything that a layer's backward pass reads, in the order in which the forward pass makes it."""
    z = sizes(config, tokens)
    return {
        "attention_norm.input": z.between,
        "attention_norm.inverse_rms": z.inverse_rms,
        "attention_norm.output": z.between,
        **_kept_by_qk_norms(config, z),
        "queries": z.queries,
        **_keys_and_values(config, z),
        "attention.result": z.queries,
        "log_sums": z.log_sums,
        "ffn_norm.input": z.between,
        "ffn_norm.inverse_rms": z.inverse_rms,
        "ffn_norm.output": z.between,
        "feed_forward.w1x": z.wide,
        "feed_forward.w3x": z.wide,
    }


def _kept_by_qk_norms(config: RunConfig, z: Sizes) -> dict[str, int]:
    if not config.model.qk_layernorm:
        return {}
    return {
        "q_norm.input": z.queries,
        "k_norm.input": z.keys,
        "q_norm.inverse_rms": z.log_sums,  # one a head and token, as those are
        "k_norm.inverse_rms": z.log_sums * z.keys // z.queries,
    }


def _keys_and_values(config: RunConfig, z: Sizes) -> dict[str, int]:
    """Under CP all ranks' keys and values come, and a rank's two ranges of queries have a result each beside the whole one. FlashAttention
    keeps a copy of the rows that each range sees, here those of one document as long as the sequence; SDPA keeps them all, once."""
    cp = config.parallel.context_parallel_size
    if cp == 1:
        return {"keys": z.keys, "values": z.keys}
    both_ranges = z.keys * (2 * cp + 1) // 2 if attention_kernel(config) == "varlen" else z.keys * cp
    return {"keys": both_ranges, "values": both_ranges, "attention.result by range": z.queries}


def kept_by_chunk(config: RunConfig, tokens: int, chunk: ChunkLayers) -> dict[str, int]:
    """Tensor name -> bytes that one micro-batch leaves in a chunk between its forward and its backward pass, recomputation considered."""
    kept: Counter[str] = Counter()
    if chunk.has_embedding:
        kept.update(kept_by_embedding(config, tokens))
    for _, is_recomputed in layer_units(config, len(chunk.layers)):
        kept.update(kept_by_recomputed(config, tokens) if is_recomputed else kept_by_layer(config, tokens))
    if chunk.has_output:
        kept.update(kept_by_output(config, tokens))
    return dict(kept)


def kept_by_recomputed(config: RunConfig, tokens: int) -> dict[str, int]:
    return {"inputs of recomputed layers": sizes(config, tokens).between}


def layer_units(config: RunConfig, count: int) -> list[tuple[int, bool]]:
    """(layers, whether they are recomputed as one) in order, of a chunk of `count` layers: see Llama._layer_groups."""
    p = config.parallel
    if p.recompute_granularity != "full":
        return [(1, False)] * count
    if p.recompute_method == "block":
        again = min(count, p.recompute_num_layers)
        return [(1, True)] * again + [(1, False)] * (count - again)
    return [(min(p.recompute_num_layers, count - first), True) for first in range(0, count, p.recompute_num_layers)]


class Step(NamedTuple):
    """A part of a layer's backward pass: the weights whose gradients it makes, the bytes it needs meanwhile, the kept tensors it frees."""

    weights: tuple[str, ...]
    working: int
    frees: tuple[str, ...]


def backward_steps(config: RunConfig, tokens: int) -> list[Step]:
    """In order of time. Under sequence parallelism a column layer's input and a row layer's gradient are gathered for the step."""
    z, p = sizes(config, tokens), config.parallel
    again = z.gathered if p.sequence_parallel else 0
    norm_made_again = z.between if "layernorm" in p.recompute_modules else 0
    column_layers = norm_made_again + again + z.gathered + z.between  # their input, its gradient, and that summed over TP
    keys_values = 2 * z.keys * p.context_parallel_size
    qk_norms = _kept_by_qk_norms(config, z)
    return [
        Step(("feed_forward.w2",), again + 2 * z.wide, ()),  # the product made again, and its gradient
        Step((), 3 * z.wide, ("feed_forward.w1x", "feed_forward.w3x")),
        Step(("feed_forward.w1", "feed_forward.w3"), column_layers + 2 * z.wide, ("ffn_norm.output",)),
        Step(("ffn_norm",), 2 * z.between, ("ffn_norm.input", "ffn_norm.inverse_rms")),
        Step(("attention.wo",), again + z.queries, ()),
        Step((), 2 * z.queries + keys_values, ("queries", *_keys_and_values(config, z), "attention.result", "log_sums")),
        *([Step(("attention.q_norm", "attention.k_norm"), 2 * (z.queries + z.keys), tuple(qk_norms))] if qk_norms else []),
        Step(("attention.wq", "attention.wk", "attention.wv"), column_layers + z.queries + 2 * z.keys, ("attention_norm.output",)),
        Step(("attention_norm",), 2 * z.between, ("attention_norm.input", "attention_norm.inverse_rms")),
    ]


def forward_working(config: RunConfig, tokens: int) -> int:
    """The most that a layer's forward pass holds beside what it keeps: SwiGLU's product and what w2 makes of it, before and after the sum
    over TP."""
    z = sizes(config, tokens)
    return z.wide + z.gathered + z.between


def deferred_by_layer(config: RunConfig, tokens: int) -> dict[str, int]:
    """Tensor name -> bytes between the two halves of a zero-bubble backward pass: what each product's input is made of, and the gradient
    of its result."""
    z = sizes(config, tokens)
    norms = "input" if "layernorm" in config.parallel.recompute_modules else "output"
    inputs = (f"attention_norm.{norms}", "attention.result", f"ffn_norm.{norms}", "feed_forward.w1x", "feed_forward.w3x")
    tensors = tensors_of_layer(config, tokens)
    return {name: tensors[name] for name in inputs} | {
        "gradients of queries, keys, values": z.queries + 2 * z.keys,
        "gradient of attention.wo's result": z.gathered,
        "gradients of feed_forward.w1x, w3x": 2 * z.wide,
        "gradient of feed_forward.w2's result": z.gathered,
    }


def vocabulary_rows(config: RunConfig) -> int:
    """Rows of the embedding, or of the output layer, on the first TP rank (no other has more)."""
    return -(-config.model.vocab_size // config.parallel.tensor_model_parallel_size)


def kept_by_output(config: RunConfig, tokens: int) -> dict[str, int]:
    """The loss makes its gradients in the forward pass (model/loss.py) and keeps them instead of the logits."""
    z, main = sizes(config, tokens), BYTES[config.optimizer.main_dtype]
    return {
        "norm.input": z.between,
        "norm.inverse_rms": z.inverse_rms,
        "output.input_gradient": z.gathered,
        "output.weight_gradient": vocabulary_rows(config) * config.model.hidden_size * main,
    }


def output_working(config: RunConfig, tokens: int) -> tuple[int, int]:
    """(forward, backward): logits of a chunk of tokens in both dtypes and the weight's product; the scaled gradients and their cast."""
    z, compute, main = sizes(config, tokens), BYTES[config.optimizer.compute_dtype], BYTES[config.optimizer.main_dtype]
    cast, rows, h = compute if compute != main else 0, vocabulary_rows(config), config.model.hidden_size
    logits = rows * min(config.training.loss_chunk_size, tokens) * (main + cast)
    return z.gathered + logits + rows * h * compute, max(tokens * h, rows * h) * (main + cast)


def kept_by_embedding(config: RunConfig, tokens: int) -> dict[str, int]:
    """Under TP: which of this rank's rows were looked up, and which tokens lie on other ranks. (The tokens themselves are there anyway.)"""
    return {"embedding.rows": tokens * INT64, "embedding.elsewhere": tokens} if config.parallel.tensor_model_parallel_size > 1 else {}


def kept_by_microbatch(config: RunConfig, tokens: int, seq_length: int) -> dict[str, int]:
    """What a rank holds of each micro-batch of a step, from its start on: what it reads, and the rotary table."""
    m, b = config.model, config.training.micro_batch_size
    positions = tokens if config.data.reset_position_ids else tokens // b
    read = tokens * (2 * INT64 + 1 + 4) + positions * INT64  # tokens, targets, loss mask and weights; positions
    rotary = positions * m.head_dim * BYTES[config.optimizer.main_dtype]  # a cosine and a sine for each pair of channels
    masks = tokens // b * seq_length if attention_kernel(config) == "sdpa" and config.data.document_mask else 0
    return {"micro-batches": read, "rotary tables": rotary, "attention masks": masks * b}


def attention_kernel(config: RunConfig) -> str:
    """What `auto` means on a GPU (model/attention.py)."""
    name = config.training.attention_kernel
    return name if name != "auto" else "varlen" if config.optimizer.bf16 else "sdpa"
