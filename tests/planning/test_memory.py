"""The planner's timeline of a step: its state under each engine, its shape under every degree of parallelism, its moments."""

import subprocess
import sys

import pytest

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.config.presets import preset
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import phases
from megatron_llama3.config.validate import resolve
from megatron_llama3.model.counts import layer_parameter_count, parameter_count
from megatron_llama3.parallel.schedule import Action, Timed
from megatron_llama3.planning.activations import deferred_by_layer, kept_by_layer
from megatron_llama3.planning.estimate import describe
from megatron_llama3.planning.memory import Peak, peak_memory, peaks, play_step, rank_peak, timeline_of


def config_of(model: ModelConfig | None = None, batch: int = 8, **parallel) -> RunConfig:
    config = RunConfig(dry_run=True, model=model or ModelConfig())
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    config.training.global_batch_size = batch
    resolve(config)
    config.validate()
    return config


def peak_of(config: RunConfig) -> Peak:
    return peak_memory(config, phases(config)[0])


def peak_of_actions(config: RunConfig, *order: tuple[str, int, int]) -> Peak:
    """The peak of stage 0 where these (kind, chunk, micro-batch) are all it does."""
    timeline = [Timed(i, i + 1, Action(*action)) for i, action in enumerate(order)]
    return rank_peak(config, phases(config)[0], 0, timeline)


def test_state_of_one_plain_rank():
    """fp32 on one rank: weights, gradients and two moments, 16 bytes a parameter."""
    peak = peak_of(config_of())
    assert peak.of("weights") + peak.of("gradients") + peak.of("optimizer") == 16 * parameter_count(ModelConfig())


def test_tied_embedding_is_held_once_on_one_stage_and_twice_on_two():
    tied = ModelConfig(untie_embeddings_and_output_weights=False)
    assert peak_of(config_of(tied)).of("weights") == 4 * parameter_count(tied)
    config = config_of(tied, world_size=2, pipeline_model_parallel_size=2)
    both = sum(peak.of("weights") for peak in peaks(config, phases(config)[0]))
    assert both == 4 * (parameter_count(tied) + tied.vocab_size * tied.hidden_size)


def test_state_is_sharded_as_each_engine_does():
    def state(**parallel):
        config = config_of(world_size=4, **parallel)
        config.optimizer.bf16 = True
        peak = peak_of(config)
        return tuple(round(peak.of(kind) / parameter_count(ModelConfig()), 4) for kind in ("weights", "gradients", "optimizer"))

    assert state() == (2, 4, 3)
    assert state(engine="deepspeed", zero_stage=1) == (2, 4, 3)
    assert state(engine="deepspeed", zero_stage=2) == (2, 1, 3)
    assert state(engine="deepspeed", zero_stage=3) == (0.5, 1, 3)
    assert state(engine="deepspeed", zero_stage=1, optimizer_cpu_offload=True) == (2, 4, 0)


def test_in_flight_activations_follow_the_schedule():
    """1F1B: stage p of 4 holds 4 - p micro-batches of its one layer, whatever M; M = 2 holds at most 2."""

    def held(batch: int, **parallel):
        config = config_of(batch=batch, world_size=4, pipeline_model_parallel_size=4, **parallel)
        queries = kept_by_layer(config, 1024)["queries"]
        return [peak.held["activations", "queries"] / queries for peak in peaks(config, phases(config)[0])[:3]]

    assert held(8) == held(64) == [4, 3, 2]
    assert held(2) == [2, 2, 2]


def test_a_deferred_weight_half_keeps_what_its_products_need():
    config = config_of(world_size=4, pipeline_model_parallel_size=4)
    peak = peak_of_actions(config, ("F", 0, 0), ("F", 0, 1), ("I", 0, 0), ("I", 0, 1), ("W", 0, 0), ("W", 0, 1))
    deferred = deferred_by_layer(config, 1024)
    assert {name: peak.held["activations", name] for name in deferred if "gradient" in name} == {
        name: 2 * size for name, size in deferred.items() if "gradient" in name
    }


def few_tokens(**parallel) -> RunConfig:
    """Two chunks of one layer on each of two stages, DP 16, four micro-batches, in bf16: gradients outweigh everything else."""
    stages = {"world_size": 32, "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    config = config_of(ModelConfig(vocab_size=16), batch=64, **stages, **parallel)
    config.optimizer.bf16, config.data.seq_length = True, 16
    return config


def test_whole_gradients_live_from_a_chunks_first_backward_to_its_reduction():
    """A chunk whose backward passes are done has reduced gradients while the other's are whole."""
    config = few_tokens()
    layer, embedding = layer_parameter_count(config.model), config.model.vocab_size * config.model.hidden_size
    forwards = [("F", chunk, m) for chunk in (0, 2) for m in (0, 1)]
    one_by_one = peak_of_actions(config, *forwards, ("B", 2, 0), ("B", 2, 1), ("B", 0, 0), ("B", 0, 1))
    in_turns = peak_of_actions(config, *forwards, ("B", 2, 0), ("B", 0, 0), ("B", 2, 1), ("B", 0, 1))
    whole = [peak.held["gradients", "whole gradients"] for peak in (one_by_one, in_turns)]
    assert whole == [4 * layer, 4 * (2 * layer + embedding)]


def test_reducing_every_group_of_microbatches_frees_whole_gradients():
    assert peak_of(few_tokens(reduce_gradients_every=2)).of("gradients") < peak_of(few_tokens()).of("gradients")


@pytest.mark.parametrize(
    "parallel",
    [
        {"context_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble"},
        {"pipeline_model_parallel_size": 2, "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "reduce_gradients_every": 2},
    ],
)
def test_a_step_gives_back_all_it_took(parallel):
    """But for what the optimizer needs, and the micro-batches that the engine still holds."""
    config = config_of(world_size=8, tensor_model_parallel_size=2, **parallel)
    config.optimizer.bf16 = True
    for stage, timeline in enumerate(timeline_of(config, 4)):
        books = play_step(config, phases(config)[0], stage, timeline)
        left = {name for (_, name), size in books.held.items() if size}
        always = {"master weights", "Adam's moments", "reduced gradients", "micro-batches", "rotary tables"}
        assert left - {"a message that leaves and one that comes"} == always
        assert all(size >= 0 for size in books.held.values())


def test_recomputation_and_sequence_parallelism_shrink_activations():
    def kept(**parallel):
        return peak_of(config_of(world_size=2, tensor_model_parallel_size=2, **parallel)).of("activations")

    plain = kept()
    assert kept(sequence_parallel=True) < plain
    full = {"recompute_granularity": "full"}
    block = [kept(**full, recompute_method="block", recompute_num_layers=n) for n in (1, 2, 4)]
    assert plain > block[0] > block[1] > block[2]
    assert kept(**full, recompute_method="uniform", recompute_num_layers=1) == block[2]


def test_table_of_a_405b_layer():
    """MiB that one layer keeps at TP 8 with sequence parallelism, 8,192 tokens in bf16."""
    config = config_of(preset("llama3-405b"), world_size=8, tensor_model_parallel_size=8, sequence_parallel=True)
    config.optimizer.bf16 = True
    kept = {name: size / 2**20 for name, size in kept_by_layer(config, 8192).items() if not name.endswith("inverse_rms")}
    residual = {f"{norm}.{what}": 32 for norm in ("attention_norm", "ffn_norm") for what in ("input", "output")}
    attention = {"queries": 32, "keys": 2, "values": 2, "attention.result": 32, "log_sums": 0.5}
    assert kept == residual | attention | {"feed_forward.w1x": 104, "feed_forward.w3x": 104}
    assert sum(kept.values()) == 404.5


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
