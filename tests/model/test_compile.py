"""A block is one graph for torch.compile: a break would cost the fusions that --compile-blocks is for."""

import pytest
import torch

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.model.attention import KERNELS, AttentionMask
from megatron_llama3.model.llama import Llama
from megatron_llama3.model.rope import rotary_table
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.planning.local_ranks import run_ranks


def graph_breaks(parallel: ParallelConfig) -> int:
    groups = initialize_groups(parallel)
    tp = TensorParallel(groups.tp, parallel.sequence_parallel)
    config = ModelConfig(num_layers=1, hidden_size=48, ffn_hidden_size=96, num_attention_heads=12, num_query_groups=2)
    model = Llama(config, tp, groups.cp)
    x = torch.randn(16 // tp.size if tp.sequence_parallel else 16, 1, 48)
    plan = KERNELS["sdpa"].plan(AttentionMask([(0, 16)]), 1)
    arguments = (x, rotary_table(torch.arange(16)[:, None], model.frequencies), plan)
    return torch._dynamo.explain(model.layers["0"])(*arguments).graph_break_count


@pytest.mark.parametrize("layout", [{}, {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}], ids=["one", "tp2"])
def test_a_block_is_one_graph(layout):
    parallel = ParallelConfig(**layout)
    assert set(run_ranks(parallel.world_size, graph_breaks, parallel)) == {0}
