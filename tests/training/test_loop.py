"""The loop and one step by fakes: who is called with what, in which order, and what the state counts."""

from types import SimpleNamespace

import pytest

from megatron_llama3.config.run import RunConfig
from megatron_llama3.training import loop, step
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult


def test_a_new_state_has_counted_nothing():
    zeros = {"iteration", "consumed_samples", "consumed_tokens", "lost_updates", "lost_samples", "skipped_in_a_row", "useful_seconds"}
    assert vars(TrainState()) == dict.fromkeys(zeros, 0) | {"recent_losses": [], "rolled_back_to": []}


def test_what_the_weights_are_made_of():
    state = TrainState(iteration=9, lost_updates=2, consumed_samples=36, lost_samples=8)
    assert (state.updates, state.update_samples) == (7, 28)


def test_a_state_is_read_from_a_checkpoint_that_knows_more_or_less():
    assert TrainState.from_saved({"iteration": 4, "consumed_tokens": 7, "unknown": 1}) == TrainState(iteration=4, consumed_tokens=7)


def run(monkeypatch, skipped=(), stops_at: int = 4, iterations: int = 10, start: int = 0):
    """(why it stopped, state, what hooks saw) of steps of 2.5 s each."""
    clock, seen = [100.0], []
    state = TrainState(iteration=start)

    def train_step(engine, stream, state, config, objective) -> StepResult:
        assert (engine.name, stream, objective) == ("engine", "stream", "objective")
        state.iteration += 1
        clock[0] += 2.5
        return StepResult(1.0, 1.0, 1e-3, 4, 8, "bad" if state.iteration in skipped else None)

    def after(state: TrainState, control: str) -> str | None:
        assert control == "control"
        return "told to" if state.iteration == stops_at else None

    def hook(name: str):
        return lambda state, result, is_last: seen.append((name, state.iteration, result.skipped, is_last))

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = RunConfig()
    config.training.train_iters = iterations
    engine = SimpleNamespace(name="engine", groups=SimpleNamespace(control="control"))
    reason = loop.train(engine, "objective", "stream", state, config, [hook("a"), hook("b")], SimpleNamespace(after=after))
    return reason, state, seen


def test_hooks_run_in_order_after_each_step_and_know_the_last(monkeypatch):
    reason, state, seen = run(monkeypatch, stops_at=2)
    assert (reason, state.iteration) == ("told to", 2)
    assert seen == [("a", 1, None, False), ("b", 1, None, False), ("a", 2, None, True), ("b", 2, None, True)]


def test_seconds_are_useful_in_steps_that_were_not_skipped(monkeypatch):
    _, state, _ = run(monkeypatch, skipped=(2,))
    assert state.useful_seconds == 7.5


@pytest.mark.parametrize("start", [10, 11])
def test_a_run_that_is_done_makes_no_step(monkeypatch, start):
    reason, _, seen = run(monkeypatch, start=start)
    assert (reason, seen) == ("nothing left to do: --train-iters is reached already", [])


@pytest.mark.parametrize("skipped", [None, "the loss is nan"])
def test_one_step(monkeypatch, skipped):
    calls = []

    def call(name: str, result=None):
        return lambda *arguments: calls.append((name, *arguments)) or result

    monkeypatch.setattr(step, "phase_at", lambda config, tokens: (6, 32) if tokens == 1000 else None)
    monkeypatch.setattr(step, "next_learning_rate", lambda config, state, batch_size: 1e-3 * batch_size)
    monkeypatch.setattr(step, "reason_to_skip", lambda means, norm, state, training: calls.append(("asked", means, norm)) or skipped)
    monkeypatch.setattr(step, "note_step", lambda state, loss, is_skipped, training: calls.append(("noted", loss, is_skipped)))
    names = ("optimizer_step", "skip_step")
    engine = SimpleNamespace(
        groups=SimpleNamespace(at=SimpleNamespace(dp=1), topology=SimpleNamespace(dp=3)),
        **{name: call(name) for name in names}, clip_gradients=call("clip", 0.5), forward_backward=call("forward_backward", {"loss": 2.0}),
    )  # fmt: skip
    stream = SimpleNamespace(next_batch=call("next", "batch"), read_ahead=call("ahead"))
    config = RunConfig()
    config.training.micro_batch_size, config.optimizer.clip_grad = 2, 0.75
    state = TrainState(consumed_samples=100, consumed_tokens=1000, lost_samples=10)
    result = step.train_step(engine, stream, state, config, "objective")
    assert result == StepResult(2.0, 0.5, 6e-3, 6, 32, skipped)
    wanted, end = (6, 32, 2, 1, 3), ("optimizer_step", 6e-3) if skipped is None else ("skip_step",)
    assert calls == [
        *(("next", *wanted), ("ahead", *wanted), ("forward_backward", "batch", "objective"), ("clip", 0.75)),
        *(("asked", {"loss": 2.0}, 0.5), end, ("noted", 2.0, skipped is not None)),
    ]
    assert (state.consumed_samples, state.consumed_tokens, state.lost_samples) == (106, 1192, 10 if skipped is None else 16)
