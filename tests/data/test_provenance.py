"""From a step back to its documents: what the list names is what the batch held."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_llama3.config.command_line import resolved_yaml
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import phase_at
from megatron_llama3.data.indexed_dataset import IndexedDatasetWriter
from megatron_llama3.data.loader import Batch, build_train_and_valid_streams
from megatron_llama3.data.provenance import pieces, sequences_of_step
from tests.data.datasets import random_documents


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """Two datasets, two data-parallel ranks, both ramps."""
    for name, seed in (("a", 1), ("b", 2)):
        documents = random_documents(60, seed, high=5000)
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_documents(np.concatenate(documents), [len(d) for d in documents], [[i % 2, i, i + 1] for i in range(60)])
            writer.finalize(sources=[{"path": f"{name}0.jsonl", "unit": "bytes"}, {"path": f"{name}1.parquet", "unit": "rows"}])
    config = RunConfig()
    config.data.data_path = ["0.4", str(tmp_path / "a"), "0.6", str(tmp_path / "b")]
    config.data.seq_length_schedule, config.data.seq_length = "0:16 500:32", 32
    config.training.step_batch_size_schedule, config.training.global_batch_size = "0:4 700:8", 8
    config.training.micro_batch_size, config.parallel.world_size = 2, 2
    return config


def train(config: RunConfig, folder: Path, steps: int, save_at: list[int]) -> list[list[Batch]]:
    """What the training loop does with data: the batches of both ranks for each step, and checkpoints without weights."""
    streams = [build_train_and_valid_streams(config)[0] for _ in range(2)]
    tokens, batches = 0, []
    for iteration in range(1, steps + 1):
        batch_size, seq_length = phase_at(config, tokens)
        batches.append([stream.next_batch(batch_size, seq_length, 2, d, 2) for d, stream in enumerate(streams)])
        tokens += batch_size * seq_length
        if iteration in save_at:
            checkpoint = folder / f"iter_{iteration:07d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "run_config.yaml").write_text(resolved_yaml(config))
            state = {"iteration": iteration, "consumed_tokens": tokens, "data": streams[0].state_dict()}
            (checkpoint / "train_state.json").write_text(json.dumps(state))
    return batches


@pytest.mark.parametrize("step", [1, 5, 8, 9, 10, 16])
@pytest.mark.parametrize("start", ["checkpoints", "config"])
def test_the_tokens_named_are_the_tokens_trained_on(config, tmp_path, step, start):
    batches = train(config, tmp_path / "run", 16, save_at=[5, 9])[step - 1]
    load = tmp_path / "run"
    if start == "config":
        load = tmp_path / "run" / "iter_0000005" / "run_config.yaml"
    places = sequences_of_step(load, step)
    assert len(places) == sum(batch.tokens.shape[0] * batch.tokens.shape[1] for batch in batches)
    for place in places:
        dataset = place.source.dataset
        named = [dataset.document(p.document)[p.start : p.start + p.length] for p in pieces(place)]
        np.testing.assert_array_equal(np.concatenate(named), batches[place.dp_rank].tokens[place.micro_batch, place.row])
        for piece in pieces(place):
            name, unit = Path(dataset.prefix).name, ["bytes", "rows"][piece.document % 2]
            file = f"{name}{piece.document % 2}.{'parquet' if piece.document % 2 else 'jsonl'}"
            assert piece.origin == f"{file} {unit} {piece.document} to {piece.document + 1}"


def test_after_a_change_of_blend_the_config_of_the_checkpoint_after_the_step_counts(config, tmp_path):
    train(config, tmp_path / "run", 5, save_at=[5])
    before = (tmp_path / "run" / "iter_0000005" / "train_state.json").read_text()
    config.data.data_path[0] = "0.9"
    stream, _ = build_train_and_valid_streams(config)
    stream.load_state_dict(json.loads(before)["data"])
    batch_size, seq_length = phase_at(config, json.loads(before)["consumed_tokens"])
    plan = stream.plan_batch(batch_size, seq_length)
    after = tmp_path / "run" / "iter_0000006"
    after.mkdir()
    (after / "run_config.yaml").write_text(resolved_yaml(config))
    (after / "train_state.json").write_text(json.dumps({"iteration": 6}))
    places = sequences_of_step(tmp_path / "run", 6)
    assert [(place.source.dataset.prefix, place.position, place.stretches) for place in places] == [
        (stream.sources[source].dataset.prefix, plan.positions[k], stream.stretches(plan, k)) for k, source in enumerate(plan.sources)
    ]


@pytest.mark.parametrize("start", ["checkpoints", "config"])
def test_a_run_of_the_old_order_is_followed_in_it(config, tmp_path, start):
    """Its checkpoints say nothing of blocks; the steps before the first one were of the old order as well."""
    train(config, tmp_path / "run", 9, save_at=[5])
    path = tmp_path / "run" / "iter_0000005" / "train_state.json"
    state = json.loads(path.read_text())
    for row in state["data"]["sources"]:
        del row["blocks"]
    path.write_text(json.dumps(state))
    for step in (1, 4, 6):
        load = tmp_path / "run" if start == "checkpoints" else path.with_name("run_config.yaml")
        places = sequences_of_step(load, step)
        assert all(place.stretches == [(place.position, len_of(place))] for place in places)


def len_of(place) -> int:
    return sum(piece.length for piece in pieces(place))


def test_what_does_not_lead_to_the_step_is_refused(config, tmp_path):
    train(config, tmp_path / "run", 5, save_at=[5])
    with pytest.raises(UserError, match="count from 1"):
        sequences_of_step(tmp_path / "run", 0)
    with pytest.raises(UserError, match="neither a run_config"):
        sequences_of_step(tmp_path, 3)
    config.checkpoint.load = "/elsewhere"
    (tmp_path / "run" / "iter_0000005" / "run_config.yaml").write_text(resolved_yaml(config))
    with pytest.raises(UserError, match="went on from /elsewhere"):
        sequences_of_step(tmp_path / "run", 3)
