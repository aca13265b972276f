"""Garbage is collected at the interval and at no other time."""

import gc

import pytest

from megatron_llama3.training.garbage import ManualGarbageCollection
from megatron_llama3.training.state import TrainState


@pytest.fixture
def collected(monkeypatch):
    """What was called, in order; garbage collection is on again afterwards."""
    calls = []
    monkeypatch.setattr(gc, "collect", lambda: calls.append("collect"))
    monkeypatch.setattr(gc, "disable", lambda: calls.append("disable"))
    return calls


@pytest.mark.parametrize("interval, at", [(3, [3, 6, 9]), (1, list(range(1, 10))), (0, [])])
def test_steps_at_which_garbage_is_collected(collected, interval, at):
    hook = ManualGarbageCollection(interval)
    assert collected == ["disable", "collect"]
    found = []
    for iteration in range(1, 10):
        del collected[:]
        hook(TrainState(iteration), None, False)
        found += [iteration] * len(collected)
    assert found == at
