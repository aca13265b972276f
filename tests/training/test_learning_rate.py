"""The learning rate at hand-computed steps."""

import pytest

from megatron_llama3.config.run import OptimizerConfig, RunConfig
from megatron_llama3.training.learning_rate import learning_rate, next_learning_rate
from megatron_llama3.training.state import TrainState

TRAIN_ITERS = 110


def rate(step: int, **fields) -> float:
    config = OptimizerConfig(**{"lr": 8.0, "min_lr": 2.0, "lr_warmup_iters": 10, **fields})
    return learning_rate(config, step, TRAIN_ITERS)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_warm_up_rises_from_its_first_share_to_the_peak(style):
    assert [rate(step, lr_decay_style=style) for step in (1, 5, 10)] == pytest.approx([0.8, 4.0, 8.0])


def test_cosine_passes_its_middle_and_stays_at_the_floor():
    # 60 is half of the way from 10 to 110; a quarter of it stands at (1 + cos 45 degrees) / 2 = 0.853553 of the height.
    assert [rate(step) for step in (35, 60, 110, 111, 1000)] == pytest.approx([2 + 6 * 0.8535533906, 5.0, 2.0, 2.0, 2.0])


def test_linear_falls_evenly_and_may_end_at_zero():
    assert [rate(step, lr_decay_style="linear") for step in (35, 60, 110, 500)] == pytest.approx([6.5, 5.0, 2.0, 2.0])
    assert rate(110, lr_decay_style="linear", min_lr=0.0) == 0


def test_constant_stays_at_the_peak():
    assert [rate(step, lr_decay_style="constant") for step in (11, 110, 1000)] == [8.0, 8.0, 8.0]


def test_decay_ends_where_lr_decay_iters_says():
    assert [rate(step, lr_decay_iters=60) for step in (35, 60, 110)] == pytest.approx([5.0, 2.0, 2.0])


def test_without_warm_up_the_first_step_is_a_step_of_the_decay():
    assert rate(1, lr_warmup_iters=0, lr_decay_style="linear", lr_decay_iters=100) == pytest.approx(8 - 6 / 100)


def test_by_samples_the_rate_goes_by_sequences_that_the_weights_are_made_of():
    config = RunConfig()
    config.training.train_samples = 110
    config.optimizer = OptimizerConfig(lr=8.0, min_lr=2.0, lr_warmup_samples=10)
    # The update reaches sequence 60, half of the way from 10 to 110; 8 more were read by a step that was skipped.
    assert next_learning_rate(config, TrainState(consumed_samples=64, lost_samples=8), 4) == pytest.approx(5.0)
    assert next_learning_rate(config, TrainState(), 5) == pytest.approx(4.0)
    config.optimizer.lr_decay_samples = 60
    assert next_learning_rate(config, TrainState(consumed_samples=56), 4) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("style", "half_way"), [("linear", 5.0), ("cosine", 5.0), ("exponential", 2 + 6 * 0.41421356), ("minus_sqrt", 2 + 6 * 0.29289322)]
)
def test_wsd_is_stable_and_falls_over_the_last_steps(style, half_way):
    rates = [rate(step, lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_iters=20) for step in (5, 10, 90, 100, 110, 200)]
    assert rates == pytest.approx([4.0, 8.0, 8.0, half_way, 2.0, 2.0])
