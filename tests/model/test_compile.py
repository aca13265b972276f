"""A block is one graph for torch.compile: a break would cost the fusions that --compile-blocks is for. And it keeps no more for its
backward pass than a block that runs op by op."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.config.run import RunConfig
from megatron_llama3.model.attention import KERNELS, AttentionMask
from megatron_llama3.model.llama import BuildOptions, Llama
from megatron_llama3.model.rope import rotary_table
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.planning.activations import kept_by_layer
from megatron_llama3.planning.local_ranks import run_ranks

TOKENS = 128


def graph_breaks(parallel: ParallelConfig, kernel: str) -> int:
    groups = initialize_groups(parallel)
    tp = TensorParallel(groups.tp, parallel.sequence_parallel)
    config = ModelConfig(num_layers=1, hidden_size=48, ffn_hidden_size=96, num_attention_heads=12, num_query_groups=2)
    model = Llama(config, tp, groups.cp, options=BuildOptions(attention_kernel=kernel))
    x = torch.randn(16 // tp.size if tp.sequence_parallel else 16, 1, 48)
    plan = KERNELS[kernel].plan(AttentionMask([(0, 16)]), 1)
    arguments = (x, rotary_table(torch.arange(16)[:, None], model.frequencies), plan)
    return torch._dynamo.explain(model.layers["0"])(*arguments).graph_break_count


@pytest.mark.parametrize("layout", [{}, {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}], ids=["one", "tp2"])
@pytest.mark.parametrize("kernel", ["sdpa", "tiled"])
def test_a_block_is_one_graph(layout, kernel):
    parallel = ParallelConfig(**layout)
    assert set(run_ranks(parallel.world_size, graph_breaks, parallel, kernel)) == {0}


def kept_bytes(config: RunConfig) -> int:
    """What a compiled block keeps beside weights and rotary tables. The backend cuts the graph in two as Inductor does, and runs it."""
    groups = initialize_groups(config.parallel)
    tp = TensorParallel(groups.tp, config.parallel.sequence_parallel)
    options = BuildOptions(attention_kernel="sdpa", recompute_modules=config.parallel.recompute_modules)
    model = Llama(config.model, tp, groups.cp, options=options)
    rotary = rotary_table(torch.arange(TOKENS)[:, None], model.frequencies)
    block = model.layers["0"]
    block.compile(backend="aot_eager_decomp_partition")
    kept, left_out = {}, {t.untyped_storage().data_ptr() for t in (*model.parameters(), *rotary)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(TOKENS // tp.size, 1, config.model.hidden_size, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = block(x, rotary, KERNELS["sdpa"].plan(AttentionMask([(0, TOKENS)]), 1))
    result.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("modules", [[], ["layernorm"]], ids=["everything", "layernorm"])
def test_a_compiled_block_keeps_what_the_table_says(modules):
    """Traced, the gathered input of a column layer was made in the forward pass and kept: 852 MiB a layer of 405B instead of 404."""
    config = RunConfig(dry_run=True)
    config.model = ModelConfig(num_layers=1, hidden_size=256, ffn_hidden_size=832, num_attention_heads=4, num_query_groups=2, vocab_size=64)
    config.parallel = ParallelConfig(world_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
    config.parallel.recompute_granularity, config.parallel.recompute_modules = "selective" if modules else None, modules
    planned = sum(kept_by_layer(config, TOKENS).values())
    assert run_ranks(2, kept_bytes, config) == [pytest.approx(planned, rel=0.01)] * 2
