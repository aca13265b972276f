"""A run that is saved and resumed goes on as if it had never stopped: bitwise in the same layout, within rounding in another."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron_llama3.checkpoint.start import find_start, load_start
from megatron_llama3.checkpoint.store import CheckpointWriter
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.data.loader import build_train_and_valid_streams
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.step import train_step

VOCABULARY = 103
SAVED_AT, END = 3, 6

LAYOUTS = {
    "one": {},
    "tp2_pp2": {"world_size": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "tp4": {"world_size": 4, "tensor_model_parallel_size": 4},
    "dp2_cp2": {"world_size": 4, "context_parallel_size": 2},
    "tp3_dp2": {"world_size": 6, "tensor_model_parallel_size": 3, "sequence_parallel": True},
    "pp2_dp2_v2": {"world_size": 4, "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    prefix = tmp_path_factory.mktemp("data") / "corpus"
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for length in rng.integers(5, 90, 60):
            writer.add_document(rng.integers(0, VOCABULARY, length))
        writer.finalize()
    return str(prefix)


def run_config(data: str, save: Path | str, tied: bool = True, **layout) -> RunConfig:
    config = RunConfig(parallel=ParallelConfig(**layout))
    config.model = ModelConfig(
        num_layers=4,
        hidden_size=24,
        ffn_hidden_size=48,
        num_attention_heads=12,
        num_query_groups=1,
        vocab_size=VOCABULARY,
        untie_embeddings_and_output_weights=not tied,
    )
    config.data.data_path, config.data.seq_length, config.data.split = [data], 24, "1,0,0"
    config.data.seq_length_schedule = "0:12 144:24"  # the save falls exactly on the ramp
    config.training.step_batch_size_schedule = "0:4 240:8"
    config.training.train_iters, config.training.eval_iters = END, 0
    config.optimizer.lr, config.optimizer.clip_grad, config.optimizer.lr_warmup_iters = 1e-3, 0.5, 2
    config.checkpoint.save = config.checkpoint.load = str(save)
    return config


def run(config: RunConfig, until: int, save: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses from where the run starts, and every state tensor at its end, on each rank."""
    groups = initialize_groups(config.parallel)
    stream, _ = build_train_and_valid_streams(config)
    start = find_start(config, groups)
    engine = build_engine(config, groups)
    state = load_start(start, config, engine, stream)
    losses = []
    while state.iteration < until:
        losses.append(train_step(engine, stream, state, config).loss)
    if save:
        writer = CheckpointWriter(config, engine)
        writer.save(state, stream)
        train_step(engine, stream, state, config)  # what is written must be the state at the save
        writer.wait()
        return losses, {}
    tensors = engine.state_tensors()
    return losses, {k: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for k, t in tensors.items()}


def start(config: RunConfig, *args):
    """Losses (rank 0's) and the tensors of all ranks together."""
    results = run_ranks(config.parallel.world_size, run, config, *args)
    tensors = {}
    for _, held in results:
        tensors |= held
    return results[0][0], tensors


@pytest.mark.parametrize(
    ("before", "after"),
    [("one", "one"), ("tp2_pp2", "tp2_pp2"), ("dp2_cp2", "dp2_cp2"), ("tp2_pp2", "tp4"), ("tp4", "dp2_cp2"), ("dp2_cp2", "tp3_dp2")]
    + [("tp3_dp2", "pp2_dp2_v2"), ("pp2_dp2_v2", "one")],
)
def test_resumed_equals_unbroken(data, tmp_path, before, after):
    tied = before != "tp4"
    first = run_config(data, tmp_path / "run", tied, **LAYOUTS[before])
    start(first, SAVED_AT, True)
    resumed_losses, resumed = start(run_config(data, tmp_path / "run", tied, **LAYOUTS[after]), END)
    unbroken_config = deepcopy(first)
    unbroken_config.checkpoint.load = None
    unbroken_losses, unbroken = start(unbroken_config, END)
    assert resumed.keys() == unbroken.keys()
    if before == after:
        assert resumed_losses == unbroken_losses[SAVED_AT:]
        assert all(torch.equal(resumed[k], unbroken[k]) for k in unbroken)
    else:
        assert resumed_losses == pytest.approx(unbroken_losses[SAVED_AT:], rel=1e-6)


def test_loading_is_bitwise_under_every_layout(data, tmp_path):
    config = run_config(data, tmp_path / "run", **LAYOUTS["tp2_pp2"])
    start(config, SAVED_AT, True)
    loaded = {name: start(run_config(data, tmp_path / "run", **layout), SAVED_AT)[1] for name, layout in LAYOUTS.items()}
    for name, tensors in loaded.items():
        assert tensors.keys() == loaded["one"].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, loaded["one"][key]), f"{key} under {name}"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
