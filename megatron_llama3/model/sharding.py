"""One table of every weight: its name, shape, split dimension and initializer. Layers, engines, checkpoint and planner read it.

Weight names are Meta's, with global layer numbers, so that a name means the same tensor under every layout.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llama3.config.model import ModelConfig


@dataclass(frozen=True)
class WeightSpec:
    """A weight as a whole.

    `unit` is the number of rows or columns along `split_dim` that stay together (a head). `init_std` 0 means ones (norm weights).
    """

    shape: tuple[int, ...]
    split_dim: int | None = None
    unit: int = 1
    init_std: float = 0.0

    @property
    def is_norm(self) -> bool:
        return len(self.shape) == 1

    def split_dim_at(self, tp_size: int) -> int | None:
        """The dimension that TP cuts, or None where every rank holds the whole weight (norms; KV heads fewer than TP)."""
        if tp_size == 1 or self.split_dim is None:
            return None
        units = self.shape[self.split_dim] // self.unit
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
        """Whether each TP rank's gradient of this replicated weight is a part of the sum: norms see a piece of the sequence under
        sequence parallelism, a replicated KV weight only the heads that its rank uses."""
        if tp_size == 1 or self.split_dim_at(tp_size) is not None:
            return False
        return sequence_parallel if self.is_norm else True


def weight_table(config: ModelConfig) -> dict[str, WeightSpec]:
    """Every weight of the whole model, in order."""
    hidden, vocabulary, std = config.hidden_size, config.vocab_size, config.init_method_std
    table = {"tok_embeddings.weight": WeightSpec((vocabulary, hidden), 0, init_std=std)}
    for layer in range(config.num_layers):
        table |= {f"layers.{layer}.{name}": spec for name, spec in layer_weights(config).items()}
    table["norm.weight"] = WeightSpec((hidden,))
    if config.untie_embeddings_and_output_weights:
        table["output.weight"] = WeightSpec((vocabulary, hidden), 0, init_std=std)
    return table


def layer_weights(config: ModelConfig) -> dict[str, WeightSpec]:
    """The weights of one transformer block. Those that end a residual branch start smaller by sqrt(2 * layers), as in Megatron-LM."""
    hidden, ffn, head = config.hidden_size, config.ffn_hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_query_groups * head
    std = config.init_method_std
    out_std = std / math.sqrt(2 * config.num_layers)
    return {
        "attention_norm.weight": WeightSpec((hidden,)),
        "attention.wq.weight": WeightSpec((queries, hidden), 0, head, std),
        "attention.wk.weight": WeightSpec((keys, hidden), 0, head, std),
        "attention.wv.weight": WeightSpec((keys, hidden), 0, head, std),
        "attention.wo.weight": WeightSpec((hidden, queries), 1, head, out_std),
        "ffn_norm.weight": WeightSpec((hidden,)),
        "feed_forward.w1.weight": WeightSpec((ffn, hidden), 0, init_std=std),
        "feed_forward.w2.weight": WeightSpec((hidden, ffn), 1, init_std=out_std),
        "feed_forward.w3.weight": WeightSpec((ffn, hidden), 0, init_std=std),
    }


ROWS_BLOCK_ELEMENTS = 1 << 20


def initial_weight(name: str, spec: WeightSpec, seed: int, tp_size: int = 1, tp_rank: int = 0) -> Tensor:
    """This rank's part of a weight, float32 on the CPU, a function of (name, shape, seed) alone and so the same under every layout.

    Rows come in blocks with a generator each: a rank draws only the blocks that its rows lie in, and memory stays bounded.
    """
    if spec.init_std == 0:
        return torch.ones(spec.local_shape(tp_size, tp_rank))
    dim = spec.split_dim_at(tp_size)
    start, end = spec.local_range(tp_size, tp_rank) if dim is not None else (0, spec.shape[0])
    first_row, last_row = (start, end) if dim != 1 else (0, spec.shape[0])
    weight = torch.empty(spec.local_shape(tp_size, tp_rank))
    block = max(1, ROWS_BLOCK_ELEMENTS // spec.shape[1])
    for top in range(first_row - first_row % block, last_row, block):
        rows = min(block, spec.shape[0] - top)
        drawn = torch.randn(rows, spec.shape[1], generator=_generator(name, seed, top)) * spec.init_std
        a, b = max(top, first_row), min(top + rows, last_row)
        piece = drawn[a - top : b - top]
        weight[a - first_row : b - first_row] = piece if dim != 1 else piece[:, start:end]
    return weight


def _generator(name: str, seed: int, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{name}/{seed}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
