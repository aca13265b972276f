"""A run that is saved and resumed goes on as if it had never stopped: bitwise in the same layout, within rounding in another."""

import re
from dataclasses import dataclass, replace
from functools import cache
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
from megatron_llama3.training.objectives import NextToken
from megatron_llama3.training.step import train_step

VOCABULARY = 103
SAVED_AT, END = 10, 20

# Model: 4 layers, 24 query and 2 KV heads; TP 4, 6 and 8 hold copies of KV heads, and no TP above 1 divides the vocabulary.
LAYOUTS = {
    "one": {},
    "dp2": {"world_size": 2},
    "dp4": {"world_size": 4},
    "dp2_cp2": {"world_size": 4, "context_parallel_size": 2},
    "tp2": {"world_size": 2, "tensor_model_parallel_size": 2},
    "tp4": {"world_size": 4, "tensor_model_parallel_size": 4},
    "tp6": {"world_size": 6, "tensor_model_parallel_size": 6, "sequence_parallel": True},
    "tp8": {"world_size": 8, "tensor_model_parallel_size": 8},
    "tp4_dp2": {"world_size": 8, "tensor_model_parallel_size": 4, "sequence_parallel": True},
    "pp4": {"world_size": 4, "pipeline_model_parallel_size": 4},
    "pp2_dp2_v2": {"world_size": 4, "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    "pp2_zero_bubble": {"world_size": 2, "pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble"},
    "pp2_uneven": {"world_size": 2, "pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
    "tp2_pp2_dp2": {"world_size": 8, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "tp2_cp2_pp2": {
        "world_size": 8, "tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 2,
    },
    "zero1_dp4": {"world_size": 4, "engine": "deepspeed"},
    "zero1_tp2_pp2": {"world_size": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "engine": "deepspeed"},
    "zero2_tp2_dp2": {"world_size": 4, "tensor_model_parallel_size": 2, "engine": "deepspeed", "zero_stage": 2},
    "zero3_dp4": {"world_size": 4, "engine": "deepspeed", "zero_stage": 3},
    "zero3_tp4": {"world_size": 4, "tensor_model_parallel_size": 4, "engine": "deepspeed", "zero_stage": 3},
}  # fmt: skip
# Saved under the first, loaded under the second; the part after "/" is how the model's embeddings are.
QUICK = ["one > one / tied", "tp4 > one / untied"]
SAMPLE = [
    "tp2_pp2_dp2 > tp2_pp2_dp2 / tied", "tp4 > tp8 / untied", "dp2_cp2 > tp6 / tied", "pp2_dp2_v2 > zero2_tp2_dp2 / tied",
    "zero3_dp4 > dp2_cp2 / untied",
]  # fmt: skip
PAIRS = [
    "dp2_cp2 > dp2_cp2 / tied", "tp4_dp2 > tp4_dp2 / untied", "pp2_dp2_v2 > pp2_dp2_v2 / tied", "pp2_zero_bubble > pp2_zero_bubble / tied",
    "zero1_tp2_pp2 > zero1_tp2_pp2 / tied", "zero2_tp2_dp2 > zero2_tp2_dp2 / untied", "zero3_dp4 > zero3_dp4 / untied",
    "tp4 > tp2 / untied", "tp4 > tp6 / untied", "tp8 > tp4 / untied", "one > tp8 / untied", "tp4_dp2 > tp2 / untied",
    "dp2 > dp4 / tied", "dp4 > dp2 / untied", "dp4 > dp2_cp2 / untied", "one > dp4 / tied", "tp6 > tp2_pp2_dp2 / tied",
    "pp4 > pp2_dp2_v2 / tied", "pp2_dp2_v2 > pp4 / tied", "pp2_dp2_v2 > tp2 / tied", "pp2_zero_bubble > pp4 / tied",
    "pp2_uneven > tp2_pp2_dp2 / tied", "tp2_pp2_dp2 > pp2_uneven / tied", "tp2_pp2_dp2 > one / tied", "tp2_cp2_pp2 > tp4_dp2 / tied",
    "pp4 > tp4 / untied", "tp2_pp2_dp2 > pp2_zero_bubble / untied",
    "zero1_dp4 > one / tied", "zero1_tp2_pp2 > tp4 / tied", "zero1_tp2_pp2 > zero3_tp4 / tied", "zero2_tp2_dp2 > pp4 / untied",
    "zero2_tp2_dp2 > zero1_dp4 / untied", "zero3_dp4 > zero2_tp2_dp2 / untied", "zero3_tp4 > zero1_tp2_pp2 / tied",
    "zero3_tp4 > tp2_cp2_pp2 / tied", "tp4_dp2 > zero2_tp2_dp2 / untied", "dp2 > zero3_dp4 / tied", "tp8 > zero3_tp4 / untied",
    "tp2_pp2_dp2 > zero1_tp2_pp2 / tied",
]  # fmt: skip
MARKED = [*QUICK, *(pytest.param(p, marks=pytest.mark.slow) for p in SAMPLE), *(pytest.param(p, marks=pytest.mark.full) for p in PAIRS)]


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
        num_attention_heads=24,
        num_query_groups=2,
        kv_channels=2,
        vocab_size=VOCABULARY,
        untie_embeddings_and_output_weights=not tied,
    )
    config.data.data_path, config.data.seq_length, config.data.split = [data], 24, "1,0,0"
    config.data.seq_length_schedule = "0:12 480:24"  # the save falls exactly on the ramp
    config.training.step_batch_size_schedule = "0:4 600:8"
    config.training.train_iters, config.training.eval_iters = END, 0
    config.optimizer.lr, config.optimizer.clip_grad, config.optimizer.lr_warmup_iters = 1e-3, 0.5, 2
    config.checkpoint.save = config.checkpoint.load = str(save)
    return config


@dataclass
class Part:
    """What a run of some steps left, on one rank or of all of them together.

    `tensors` are the state at SAVED_AT, `final` at the end, `batches` the token arrays of each step.
    """

    losses: list[float]
    batches: list[np.ndarray]
    tensors: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]


def run(config: RunConfig, until: int, save: bool) -> Part:
    """From where the config says it starts; with `save`, what is written at SAVED_AT must be the state then, while steps go on."""
    groups = initialize_groups(config.parallel)
    stream, _ = build_train_and_valid_streams(config)
    start = find_start(config, groups)
    engine = build_engine(config, groups)
    _, state = load_start(start, config, engine, stream)
    batches = record_batches(stream)
    writer = CheckpointWriter(config, engine) if save else None
    part = Part([], batches, {}, {})
    while True:
        if state.iteration == SAVED_AT:
            part.tensors = whole_tensors(engine)
            if save:
                writer.save(state, stream)
        if state.iteration == until:
            break
        part.losses.append(train_step(engine, stream, state, config, NextToken()).loss)
    if save:
        writer.wait()
    part.final = whole_tensors(engine)
    is_first_of_model = groups.at.tp == groups.at.cp == groups.at.pp == 0
    return part if is_first_of_model else replace(part, batches=[])


def record_batches(stream) -> list[np.ndarray]:
    batches, next_batch = [], stream.next_batch

    def recording(*args):
        batch = next_batch(*args)
        batches.append(batch.tokens)
        return batch

    stream.next_batch = recording
    return batches


def whole_tensors(engine) -> dict[str, torch.Tensor]:
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for k, t in engine.state_tensors().items()}


def start(config: RunConfig, until: int = END, save: bool = False) -> Part:
    """Losses of rank 0, and tensors and global batches of all ranks together: sequence k of a batch was micro-batch m, rank d, row j."""
    parts = run_ranks(config.parallel.world_size, run, config, until, save)
    ranks = [part.batches for part in parts if part.batches]
    whole = Part(parts[0].losses, [np.stack(shares, axis=1).reshape(-1, shares[0].shape[-1]) for shares in zip(*ranks)], {}, {})
    for part in parts:
        whole.tensors |= part.tensors
        whole.final |= part.final
    return whole


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """unbroken(layout, tied) -> (a run of END steps that saved at SAVED_AT, its --save folder); each is run once."""

    @cache
    def run_once(layout: str, tied: bool) -> tuple[Part, Path]:
        folder = tmp_path_factory.mktemp("run")
        return start(run_config(data, folder, tied, **LAYOUTS[layout]), save=True), folder

    return run_once


@pytest.mark.parametrize("pair", MARKED)
def test_resumed_equals_unbroken(data, unbroken, pair):
    before, after, embeddings = re.split(" [>/] ", pair)
    tied = embeddings == "tied"
    whole, folder = unbroken(before, tied)
    resumed = start(run_config(data, folder, tied, **LAYOUTS[after]))
    assert_equal_tensors(resumed.tensors, whole.tensors)
    assert all(np.array_equal(a, b) for a, b in zip(resumed.batches, whole.batches[SAVED_AT:], strict=True))
    if before == after:
        assert resumed.losses == whole.losses[SAVED_AT:]
        assert_equal_tensors(resumed.final, whole.final)
    else:
        assert resumed.losses == pytest.approx(whole.losses[SAVED_AT:], rel=1e-5)


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert sum(key.startswith("optimizer.exp_avg_sq.") and bool(tensor.any()) for key, tensor in ours.items()) > 30
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
