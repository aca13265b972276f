"""Which steps and ranks are traced, and when a GPU's memory is recorded."""

from types import SimpleNamespace

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.training import profiling
from megatron_llama3.training.profiling import Profile, memory_history
from megatron_llama3.training.state import TrainState


def config_for(tmp_path, **logging) -> RunConfig:
    config = RunConfig()
    config.logging.log_dir = str(tmp_path)
    for name, value in logging.items():
        setattr(config.logging, name, value)
    return config


def traced(tmp_path, monkeypatch, rank: int, steps: int, first: int = 3) -> list:
    """(what the profiler did, after which step) for steps 1 to `steps`; it starts after step `first` and ends with step 5."""
    calls, now = [], [0]

    def profile(record_shapes: bool, profile_memory: bool):
        names = ("start", "stop")
        act = {name: lambda name=name: calls.append((name, now[0])) for name in names}
        return SimpleNamespace(**act, export_chrome_trace=lambda path: calls.append((path, now[0])))

    monkeypatch.setattr(profiling.torch.profiler, "profile", profile)
    hook = Profile(config_for(tmp_path, profile_step_start=first, profile_step_end=5, profile_ranks=[0, 2]), rank)
    for now[0] in range(1, steps + 1):
        hook(TrainState(now[0]), None, now[0] == steps)
    return calls


def test_a_window_of_steps_on_the_ranks_that_are_asked_for(tmp_path, monkeypatch):
    path = str(tmp_path / "profile" / "rank2_steps4-5.json.gz")
    assert traced(tmp_path, monkeypatch, 2, 9) == [("start", 3), ("stop", 5), (path, 5)]
    assert (tmp_path / "profile").is_dir()
    assert traced(tmp_path, monkeypatch, 1, 9) == []


def test_a_run_that_ends_in_the_window_leaves_what_it_traced(tmp_path, monkeypatch):
    assert [name for name, _ in traced(tmp_path, monkeypatch, 0, 4)][:2] == ["start", "stop"]
    assert traced(tmp_path, monkeypatch, 0, 3) == [], "nothing is left to trace"


def test_memory_is_recorded_also_where_it_runs_out(tmp_path, monkeypatch):
    calls = []
    memory = SimpleNamespace(_record_memory_history=lambda: calls.append("record"), _dump_snapshot=calls.append)
    monkeypatch.setattr(profiling.torch, "cuda", SimpleNamespace(is_available=lambda: True, memory=memory))
    with memory_history(config_for(tmp_path), 1):
        calls.append("block")
    assert calls == ["block"]
    with pytest.raises(MemoryError), memory_history(config_for(tmp_path, record_memory_history=True), 1):
        raise MemoryError
    assert calls == ["block", "record", str(tmp_path / "memory" / "rank1.pickle")]


def test_without_a_gpu_there_is_no_memory_to_record(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--record-memory-history"), memory_history(config_for(tmp_path, record_memory_history=True), 0):
        pass
