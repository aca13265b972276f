"""One table that says everything of a weight: shape, what TP cuts, initial fill, decay, over what its gradient is partial. Layers,
engines, checkpoint, conversion and planner read it. Imports no torch.

Weight names are Meta's, with global layer numbers, so that a name means the same tensor under every layout.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from megatron_llama3.config.model import ModelConfig


class PartialOver(Enum):
    """Where every TP rank holds a weight whole: over what each rank's gradient is only a part of the sum."""

    SEQUENCE = "tokens of the residual stream, which sequence parallelism cuts"
    HEADS = "attention heads, of which each TP rank has its own"
    NOTHING = "every TP rank has the same, whole gradient"


@dataclass(frozen=True)
class WeightSpec:
    """A weight as a whole, of any number of dimensions.

    `unit` is the number of rows or columns along `split_dim` that stay together (a head). Raises ValueError where a weight that TP ranks
    may hold whole does not say over what its gradient is partial.
    """

    shape: tuple[int, ...]
    split_dim: int | None = None
    """the dimension that TP cuts"""
    unit: int = 1
    initial: float | Literal["ones", "zeros"] = 0.02
    """standard deviation of a normal distribution around 0, or the constant"""
    decays: bool = True
    """whether AdamW's weight decay applies"""
    partial_over: PartialOver | None = None
    is_rotated: bool = False
    """whether RoPE turns the channels that its rows stand for: Meta and Hugging Face store these in another order"""
    is_tied: bool = False
    """whether it is the embedding and the output layer at once: where both ends of a pipeline hold it, its gradient is partial over them"""

    def __post_init__(self):
        if self.partial_over is None and (self.split_dim is None or self.unit > 1):
            raise ValueError(f"a weight {self.shape} that TP ranks may hold whole must say over what its gradient is partial")

    def split_dim_at(self, tp_size: int) -> int | None:
        """The dimension that TP cuts, or None where every rank holds the whole weight (norms; KV heads fewer than TP)."""
        if tp_size == 1 or self.split_dim is None:
            return None
        units = self.shape[self.split_dim] // self.unit
        # A head is never cut: where there are fewer than ranks, each rank holds all of them and uses one.
        return None if self.unit > 1 and units < tp_size else self.split_dim

    def local_range(self, tp_size: int, tp_rank: int) -> tuple[int, int]:
        """[start, end) along `split_dim` of this rank: torch.chunk's split, which may be uneven (a vocabulary)."""
        rows = self.shape[self.split_dim]
        share = math.ceil(rows / tp_size)
        return min(rows, tp_rank * share), min(rows, (tp_rank + 1) * share)

    def local_shape(self, tp_size: int, tp_rank: int) -> tuple[int, ...]:
        dim = self.split_dim_at(tp_size)
        if dim is None:
            return self.shape
        start, end = self.local_range(tp_size, tp_rank)
        return (*self.shape[:dim], end - start, *self.shape[dim + 1 :])

    def gradient_is_partial(self, tp_size: int, sequence_parallel: bool) -> bool:
        """Whether each TP rank's gradient of this weight, whole on every rank, is a part of the sum."""
        if tp_size == 1 or self.split_dim_at(tp_size) is not None:
            return False
        return sequence_parallel if self.partial_over is PartialOver.SEQUENCE else self.partial_over is PartialOver.HEADS


def weight_table(config: ModelConfig) -> dict[str, WeightSpec]:
    """Every weight of the whole model, in order."""
    shape, std, tied = (config.vocab_size, config.hidden_size), config.init_method_std, not config.untie_embeddings_and_output_weights
    table = {"tok_embeddings.weight": WeightSpec(shape, 0, initial=std, is_tied=tied)}
    for layer in range(config.num_layers):
        table |= {f"layers.{layer}.{name}": spec for name, spec in layer_weights(config).items()}
    table["norm.weight"] = _residual_norm(config)
    if not tied:
        table["output.weight"] = WeightSpec(shape, 0, initial=std)
    return table


def layer_weights(config: ModelConfig) -> dict[str, WeightSpec]:
    """The weights of one transformer block. Those that end a residual branch start smaller by sqrt(2 * layers), as in Megatron-LM."""
    hidden, ffn, head = config.hidden_size, config.ffn_hidden_size, config.head_dim
    queries, keys = (config.num_attention_heads * head, hidden), (config.num_query_groups * head, hidden)
    std = config.init_method_std
    out_std = std / math.sqrt(2 * config.num_layers)  # 2 * layers branches add up in the residual stream
    heads = PartialOver.HEADS
    table = {
        "attention_norm.weight": _residual_norm(config),
        "attention.wq.weight": WeightSpec(queries, 0, head, std, partial_over=heads, is_rotated=True),
        "attention.wk.weight": WeightSpec(keys, 0, head, std, partial_over=heads, is_rotated=True),
        "attention.wv.weight": WeightSpec(keys, 0, head, std, partial_over=heads),
        "attention.wo.weight": WeightSpec(queries[::-1], 1, head, out_std, partial_over=heads),
        "ffn_norm.weight": _residual_norm(config),
        "feed_forward.w1.weight": WeightSpec((ffn, hidden), 0, initial=std),
        "feed_forward.w2.weight": WeightSpec((hidden, ffn), 1, initial=out_std),
        "feed_forward.w3.weight": WeightSpec((ffn, hidden), 0, initial=std),
    }
    if config.qk_layernorm:
        norm = WeightSpec((head,), initial="ones", decays=False, partial_over=heads, is_rotated=True)
        table |= {"attention.q_norm.weight": norm, "attention.k_norm.weight": norm}
    return table


def _residual_norm(config: ModelConfig) -> WeightSpec:
    return WeightSpec((config.hidden_size,), initial="ones", decays=False, partial_over=PartialOver.SEQUENCE)
