"""The learning rate at hand-computed steps."""

import pytest

from megatron_llama3.config.run import OptimizerConfig
from megatron_llama3.training.learning_rate import learning_rate

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
