"""Saves and loads by two ranks with an engine of a few plain tensors: what is on disk, what comes back, what a failure says and leaves."""

import errno
import json
import os
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron_llama3.checkpoint import store
from megatron_llama3.checkpoint.native.manifest import damage, read_manifest
from megatron_llama3.checkpoint.native.metadata import stored_tensors
from megatron_llama3.checkpoint.store import CheckpointWriter, load_checkpoint
from megatron_llama3.config.command_line import load_run_config
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.training.state import TrainState


@pytest.mark.parametrize("rank, is_left", [(0, False), (1, True)])
def test_rank_0_clears_up_what_a_killed_run_left(tmp_path, monkeypatch, rank, is_left):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo")
    partial = tmp_path / "iter_0000005.partial"
    partial.mkdir()
    config = RunConfig()
    config.checkpoint.save = str(tmp_path)
    writer = CheckpointWriter(config, SimpleNamespace(groups=SimpleNamespace(saving=None, rank=rank)))
    assert partial.exists() == is_left
    assert (writer.protected, writer.pending, writer.last_stall_seconds) == (None, None, 0.0)


@pytest.mark.parametrize("backend, is_enough", [("cuda:nccl", False), ("cpu:gloo,cuda:nccl", True), ("cpu:fake", True), ("gloo", True)])
def test_saving_needs_a_group_of_cpus(tmp_path, monkeypatch, backend, is_enough):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backend)
    config = RunConfig()
    config.checkpoint.save = str(tmp_path)
    engine = SimpleNamespace(groups=SimpleNamespace(saving=None, rank=0))
    if is_enough:
        assert CheckpointWriter(config, engine).group is None
        return
    with pytest.raises(RuntimeError, match="CPU backend"):
        CheckpointWriter(config, engine)


class FewTensors:
    """Of the engine what saving and loading ask for. Weight b is a second copy on rank 1, where it has another value."""

    def __init__(self, groups, value: float):
        self.groups, self.told = groups, []
        self.weights = {"a": torch.full((4, 3), value), "b": torch.full((2,), value + 10 * groups.rank)}
        self.moments = {"a": torch.full((4, 3), -value), "b": torch.full((2,), -value)}

    def named_weights(self):
        return self.weights.items()

    def is_second_copy(self, name: str) -> bool:
        return name == "b" and self.groups.rank == 1

    def state_tensors(self, with_optimizer: bool = True) -> dict:
        self.told.append(with_optimizer)
        tensors = {f"model.{name}": tensor for name, tensor in self.weights.items()}
        return tensors | ({f"optimizer.exp_avg.{name}": tensor for name, tensor in self.moments.items()} if with_optimizer else {})

    def state_loaded(self, step: int, with_optimizer: bool = True) -> None:
        self.told.append((step, with_optimizer))


class Stream:
    def __init__(self, position: object):
        self.position = position

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"] + 0


STATE = {"consumed_samples": 8, "consumed_tokens": 128, "lost_updates": 2, "recent_losses": [2.5, 2.25], "useful_seconds": 1.5}


def started(folder: Path, value: float = 1.0, **options) -> tuple[RunConfig, FewTensors]:
    config = RunConfig()
    config.parallel = ParallelConfig(world_size=dist.get_world_size())
    config.checkpoint.save = str(folder)
    for name, option in options.items():
        setattr(config.checkpoint, name, option)
    return config, FewTensors(initialize_groups(config.parallel), value)


def names(folder: Path) -> list[str]:
    """What is there when both ranks have come here, and before either goes on."""
    dist.barrier()
    found = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return found


# --- saves ---


def _saves(folder: Path) -> None:
    config, engine = started(folder, keep_last=2, keep_every=None)
    writer = CheckpointWriter(config, engine, folder / "iter_0000005.replaced")
    writer.check()
    writer.wait()
    for iteration in (5, 6, 7, 8):
        engine.weights["a"].fill_(iteration)
        writer.save(TrainState(iteration, **STATE), Stream(iteration))
        assert 0 < writer.last_stall_seconds < 60
        assert writer.pending is not None
        engine.weights["a"].fill_(99)  # the next step's: what is written was copied
    writer.wait()
    assert writer.pending is None
    assert names(folder) == ["iter_0000005", "iter_0000007", "iter_0000008", "latest_checkpointed_iteration.txt"], "5 was loaded from"
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "8"
    _check_folder(folder / "iter_0000008", config)
    _again(folder, config, engine)


def _check_folder(last: Path, config: RunConfig) -> None:
    assert damage(last) is None
    assert set(read_manifest(last)) == {path.name for path in last.iterdir()} - {"manifest.json"}
    assert {tensor.removeprefix("model.") for tensor in stored_tensors(last)} == {"a", "b", "optimizer.exp_avg.a", "optimizer.exp_avg.b"}
    assert load_run_config(str(last / "run_config.yaml")).parallel == config.parallel
    saved = json.loads((last / "train_state.json").read_text())
    assert {name: saved[name] for name in STATE} == STATE
    assert (saved["iteration"], saved["data"], saved["tokenizer"]) == (8, {"position": 8}, None)


def _again(folder: Path, config: RunConfig, engine: FewTensors) -> None:
    """The same step once more, and at once on disk."""
    config.checkpoint.no_async_save = True
    writer = CheckpointWriter(config, engine)
    assert writer.protected is None
    for value in (30.0, 31.0):
        engine.weights["a"].fill_(value)
        writer.save(TrainState(8), Stream(8))
        assert writer.pending is None
        assert names(folder) == ["iter_0000007", "iter_0000008", "latest_checkpointed_iteration.txt"]
        found = {"model.a": torch.empty(4, 3), "model.b": torch.empty(2)}
        dcp.load(found, checkpoint_id=folder / "iter_0000008", process_group=engine.groups.saving)
        assert torch.equal(found["model.a"], torch.full((4, 3), value))
        assert found["model.b"].tolist() == [1.0, 1.0], "the first stage's copy"


def test_saves_of_two_ranks(tmp_path):
    run_ranks(2, _saves, tmp_path)


def _fails(folder: Path) -> str:
    """Rank 1 cannot read back what it wrote."""
    config, engine = started(folder)
    writer = CheckpointWriter(config, engine)
    writer.save(TrainState(3), Stream(3))
    writer.wait()
    whole = store.summarize

    def fails(path: Path, *args):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path.name)

    store.summarize = fails if engine.groups.rank == 1 else whole
    said = []
    for finish in (writer.wait, lambda: _until_raised(writer.check)):
        writer.save(TrainState(4), Stream(4))
        with pytest.raises(UserError) as error:
            finish()
        said.append(str(error.value))
        assert writer.pending is None
        assert names(folder) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
    assert said[0] == said[1]
    store.summarize = whole
    writer.save(TrainState(4), Stream(4))
    _until_none(writer)
    assert names(folder) == ["iter_0000003", "iter_0000004", "latest_checkpointed_iteration.txt"]
    return said[0].replace(str(folder), "SAVE")


def _until_raised(check) -> None:
    while True:
        check()


def _until_none(writer: CheckpointWriter) -> None:
    while writer.pending is not None:
        writer.check()


def test_a_save_that_fails_on_one_rank_ends_on_all_and_the_next_may_succeed(tmp_path):
    for said in run_ranks(2, _fails, tmp_path):
        assert said == "--save SAVE: checkpoint could not be written: __1_0.distcp: Input/output error"


def _cannot_begin(folder: Path) -> list[str]:
    config, engine = started(folder)
    writer = CheckpointWriter(config, engine)

    def fails(config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.resolved_yaml = fails
    with pytest.raises(UserError) as error:
        writer.save(TrainState(4), Stream(4))
    assert not [*folder.iterdir()]
    return str(error.value).replace(str(folder), "SAVE")


def test_a_save_that_cannot_begin_leaves_nothing(tmp_path):
    assert run_ranks(1, _cannot_begin, tmp_path) == ["--save SAVE: checkpoint could not be written: No space left on device"]


@pytest.mark.parametrize("error, said", [
    (OSError(errno.EIO, "Broken"), "Broken"), (OSError(errno.EIO, "Broken", "x"), "x: Broken"),
    (OSError("of its own"), "of its own"), (ValueError("\n  first\nsecond\n"), "first"), (KeyError(), "KeyError"),
    (dcp.CheckpointException("all", {0: (OSError(errno.EIO, "why", "y"), None), 1: (ValueError("z"), None)}), "y: why"),
])  # fmt: skip
def test_the_first_line_of_a_failure(error, said):
    assert store._first_line(error) == said


# --- loads ---


def _loads(folder: Path) -> None:
    config, engine = started(folder, 5.0)
    writer = CheckpointWriter(config, engine)
    torch.manual_seed(9)
    expected = torch.get_rng_state()
    writer.save(TrainState(10, **STATE), Stream(33))
    writer.wait()
    dist.barrier()
    for options, optimizer, step, rng in (
        ({}, True, 8, True), ({"no_load_optim": True}, False, 8, True), ({"no_load_rng": True}, True, 8, False),
        ({"finetune": True}, False, 8, False),
    ):  # fmt: skip
        torch.manual_seed(1)
        config, other = _other(folder, engine, options)
        stream = Stream(0)
        state = load_checkpoint(folder / "iter_0000010", config, other, stream)
        assert other.told == [optimizer, (step, optimizer)]
        assert {name: tensor.unique().tolist() for name, tensor in other.weights.items()} == {"a": [5.0], "b": [5.0]}
        assert other.moments["a"].unique().tolist() == [-5.0 if optimizer else -2.0]
        assert torch.equal(torch.get_rng_state(), expected) == rng
        if "finetune" in options:
            assert (state, stream.position) == (TrainState(), 0)
        else:
            assert (state, stream.position) == (TrainState(10, **STATE), 33)


def _other(folder: Path, engine: FewTensors, options: dict) -> tuple[RunConfig, FewTensors]:
    config = RunConfig()
    for name, option in options.items():
        setattr(config.checkpoint, name, option)
    return config, FewTensors(engine.groups, 2.0)


def test_what_is_loaded_of_a_checkpoint(tmp_path):
    run_ranks(2, _loads, tmp_path)


def _refusals(folder: Path) -> list[str]:
    config, engine = started(folder, 5.0, no_async_save=True)
    CheckpointWriter(config, engine).save(TrainState(10), Stream(33))
    last, said = folder / "iter_0000010", []
    whole = json.loads((last / "train_state.json").read_text())
    damages = [{"data": {}}, {"data": {"position": "x"}}, {"rng": "AAAA"}, {"rng": 3}]
    for saved in [*(whole | change for change in damages), {name: value for name, value in whole.items() if name != "data"}]:
        (last / "train_state.json").write_text(json.dumps(saved))
        config, other = _other(folder, engine, {})
        with pytest.raises(UserError) as error:
            load_checkpoint(last, config, other, Stream(0))
        said.append(str(error.value).replace(str(folder), "SAVE").split(" (")[0])
        config.checkpoint.finetune = True
        assert load_checkpoint(last, config, other, Stream(0)) == TrainState()
    other.weights["c"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        load_checkpoint(last, config, other, Stream(0))
    assert str(error.value).startswith(f"{last}: ")
    assert "model.c" in str(error.value)
    assert "\n" not in str(error.value)
    return said


def test_what_cannot_be_restored_is_one_line(tmp_path):
    (said,) = run_ranks(1, _refusals, tmp_path)
    damaged = "SAVE/iter_0000010/train_state.json: damaged: its data position or random state cannot be restored"
    alone = "--load SAVE/iter_0000010: holds weights alone, no training run to go on with: add --finetune to start from them"
    assert said == 4 * [damaged] + [alone]


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", None])
def test_a_tokenizer_is_known_by_its_content(tmp_path, name):
    path = tmp_path / (name or "my.model")
    path.write_bytes(b"one")
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").write_bytes(b"beside it")
    config = RunConfig()
    assert store._tokenizer_digest(config) is None
    config.data.tokenizer_model = str(path if name is None else tmp_path)
    assert store._tokenizer_digest(config) == sha256(b"one").hexdigest()
    for saved in ({}, {"tokenizer": None}, {"tokenizer": sha256(b"one").hexdigest()}):
        store._check_tokenizer(saved, config, Path("RUN"))
    with pytest.raises(UserError, match="is another one than RUN was trained with: it must match"):
        store._check_tokenizer({"tokenizer": sha256(b"two").hexdigest()}, config, Path("RUN"))
    config.data.tokenizer_model = str(tmp_path / "nothing here")
    assert store._tokenizer_digest(config) is None
    store._check_tokenizer({"tokenizer": "other"}, config, Path("RUN"))
