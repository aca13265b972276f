"""The memory formula against what torch really keeps, and its shape under every degree of parallelism."""

import subprocess
import sys

import pytest

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.config.presets import preset
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import phases
from megatron_llama3.config.validate import resolve
from megatron_llama3.model.counts import parameter_count
from megatron_llama3.parallel.schedule import Action, Timed
from megatron_llama3.planning.estimate import describe
from megatron_llama3.planning.memory import layer_activation_bytes, peak_memory, rank_memory, timeline_of


def config_of(model: ModelConfig | None = None, batch: int = 8, **parallel) -> RunConfig:
    config = RunConfig(dry_run=True, model=model or ModelConfig())
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    config.training.global_batch_size = batch
    resolve(config)
    config.validate()
    return config


def memory_of(config: RunConfig):
    return peak_memory(config, phases(config)[0])[1]


def test_state_of_one_plain_rank():
    """fp32 on one rank: weights, gradients and two moments, 16 bytes a parameter."""
    memory = memory_of(config_of())
    assert memory.weights + memory.gradients + memory.optimizer == 16 * parameter_count(ModelConfig())


def test_tied_embedding_is_held_once_on_one_stage_and_twice_on_two():
    tied = ModelConfig(untie_embeddings_and_output_weights=False)
    assert memory_of(config_of(tied)).weights == 4 * parameter_count(tied)
    config = config_of(tied, world_size=2, pipeline_model_parallel_size=2)
    timeline = timeline_of(config, 8)
    both = sum(rank_memory(config, phases(config)[0], rank, timeline[rank]).weights for rank in (0, 1))
    assert both == 4 * (parameter_count(tied) + tied.vocab_size * tied.hidden_size)


def test_state_is_sharded_as_each_engine_does():
    def state(**parallel):
        config = config_of(world_size=4, **parallel)
        config.optimizer.bf16 = True
        memory = memory_of(config)
        return tuple(round(b / parameter_count(ModelConfig()), 6) for b in (memory.weights, memory.gradients, memory.optimizer))

    assert state() == (2, 5, 3)
    assert state(engine="deepspeed", zero_stage=1) == (2, 4, 3)
    assert state(engine="deepspeed", zero_stage=2) == (2, 1, 3)
    assert state(engine="deepspeed", zero_stage=3) == (0.5, 1, 3)
    assert state(engine="deepspeed", zero_stage=1, optimizer_cpu_offload=True) == (2, 4, 0)


def test_in_flight_activations_follow_the_schedule():
    """1F1B: stage p of 4 holds 4 - p micro-batches of its one layer, whatever M; M = 2 holds at most 2."""

    def held(batch: int, **parallel):
        config = config_of(batch=batch, world_size=4, pipeline_model_parallel_size=4, **parallel)
        timeline = timeline_of(config, batch)
        phase = phases(config)[0]
        one_layer = layer_activation_bytes(config, 1024)
        return [rank_memory(config, phase, rank, timeline[rank]).activations / one_layer for rank in range(3)]

    assert held(8) == held(64) == [4, 3, 2]
    assert held(2) == [2, 2, 2]
    assert held(8, pipeline_schedule="zero-bubble") == [4, 4, 4]  # the first rank's share on every rank


def test_a_deferred_weight_half_keeps_its_activations():
    config = config_of(world_size=4, pipeline_model_parallel_size=4)
    order = [("F", 0), ("I", 0), ("F", 1), ("W", 0), ("I", 1), ("W", 1)]
    timeline = [Timed(i, i + 1, Action(kind, 1, m)) for i, (kind, m) in enumerate(order)]
    assert rank_memory(config, phases(config)[0], 1, timeline).activations == 2 * layer_activation_bytes(config, 1024)


def test_recomputation_and_sequence_parallelism_shrink_activations():
    def kept(**parallel):
        return memory_of(config_of(world_size=2, tensor_model_parallel_size=2, **parallel)).activations

    plain = kept()
    assert kept(sequence_parallel=True) < plain
    assert kept(recompute_granularity="selective") < plain
    full = {"recompute_granularity": "full"}
    block = [kept(**full, recompute_method="block", recompute_num_layers=n) for n in (1, 2, 4)]
    assert plain > block[0] > block[1] > block[2]
    assert kept(**full, recompute_method="uniform", recompute_num_layers=1) == block[2]
    assert kept(**full, recompute_method="uniform", recompute_num_layers=4) < block[2]


def test_large_runs_are_described_in_no_time():
    """M of 4,096 micro-batches is no 4,096 times the work of one."""
    config = config_of(preset("llama3-70b"), batch=8192, world_size=64, tensor_model_parallel_size=8, pipeline_model_parallel_size=4)
    text = describe(config)
    assert "4,096 micro-batches of 1 on each of 2 DP ranks" in text
    assert len(layers_of_chunks(config.model, config.parallel)) == 4


def test_describing_imports_no_torch():
    program = (
        "import sys\n"
        "from megatron_llama3.config.command_line import parse_run_config\n"
        "from megatron_llama3.planning.estimate import describe\n"
        "print(describe(parse_run_config(['--dry-run', '--model-name', 'llama3.2-1b'])))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model      llama3.2-1b: 1,235,814,400 parameters, tied embeddings\n")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, "selective"])
def test_activations_are_what_autograd_keeps(recompute):
    """Every tensor that one block keeps for backward, weights and rotary tables left out, against the formula."""
    import torch
    import torch.distributed as dist
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from megatron_llama3.model.attention import AttentionMask
    from megatron_llama3.model.llama import BuildOptions, Llama
    from megatron_llama3.model.rope import rotary_table
    from megatron_llama3.parallel.tensor_parallel import TensorParallel

    model = ModelConfig(num_layers=1, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, num_query_groups=4, vocab_size=32)
    config = config_of(model, recompute_granularity=recompute)
    tokens = 256
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        options = BuildOptions(attention_kernel="sdpa", recompute_granularity=recompute)
        block = Llama(model, TensorParallel(dist.group.WORLD), dist.group.WORLD, options=options)
        rotary = rotary_table(torch.arange(tokens).unsqueeze(1), block.frequencies)
        left_out = {t.untyped_storage().data_ptr() for t in [*block.parameters(), *rotary]}
        plan = block.plan_attention(AttentionMask([(0, tokens)]), 1)
        kept: dict[int, int] = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in left_out and tensor.dtype != torch.bool:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(tokens, 1, model.hidden_size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            result = block.layers["0"](x, rotary, plan)
        assert result.shape == x.shape
        unfused_norms = 2 * tokens * (4 * model.hidden_size + 4)  # on a CPU torch's norm also keeps x / rms(x) and 1 / rms(x)
        assert sum(kept.values()) == layer_activation_bytes(config, tokens) + unfused_norms
    finally:
        dist.destroy_process_group()
