"""What the model of a run writes under a layout is what the plain reference writes from the same weights, token by token."""

import numpy as np
import pytest
import torch

from megatron_llama3.inference.sampling import GREEDY, Sampling
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.planning.equivalence import _settings_of
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.planning.plain_training import initial_weights, logits
from megatron_llama3.recipes.samples import continue_prompts
from megatron_llama3.training.build import build_engine
from tests.training.layouts import AXES, config_of

PLAIN = {axis: values[0] for axis, values in AXES.items()}
PROMPTS, COUNT, CHOOSABLE = [[3], [5, 7, 11, 2, 9, 4, 8]], 6, 20
LAYOUTS = {
    "tp sp pp": {"tp": 2, "sp": True, "pp": 2},
    "cp dp": {"cp": 2, "dp": 2},
    "pp v tied": {"pp": 2, "v": 2, "tied": True},
}


def written_by_rank(config, sampling: Sampling) -> list[list[int]]:
    engine = build_engine(config, initialize_groups(config.parallel))
    before = torch.random.get_rng_state()
    found = continue_prompts(engine, PROMPTS, COUNT, sampling, CHOOSABLE)
    assert torch.equal(before, torch.random.get_rng_state()), "a run goes on as if nothing had been written"
    return found


def written_by_reference(settings) -> list[list[int]]:
    weights, texts = initial_weights(settings), [list(prompt) for prompt in PROMPTS]
    for text in texts:
        for _ in range(COUNT):
            text.append(int(logits(torch.tensor(text), torch.arange(len(text)), weights, settings)[-1, :CHOOSABLE].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_writes_what_the_reference_writes(layout):
    config = config_of(PLAIN | layout)
    found = run_ranks(config.parallel.world_size, written_by_rank, config, GREEDY)
    (expected,) = run_ranks(1, written_by_reference, _settings_of(config))
    assert found == [expected] * config.parallel.world_size


def test_a_draw_is_the_same_under_another_layout():
    drawn = []
    for layout in ({}, {"cp": 2, "dp": 2}):
        config = config_of(PLAIN | layout)
        drawn += run_ranks(config.parallel.world_size, written_by_rank, config, Sampling(2.0, 1.0, seed=5))
    assert drawn == drawn[:1] * 5
    assert len(np.unique(drawn[0])) > 4
