"""Top-p: its definition, its edges, and that draws follow it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.inference.sampling import GREEDY, Sampling, choose, nucleus

logits_rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30)


@settings(deadline=None, max_examples=200)
@given(logits_rows, st.floats(0.1, 3), st.floats(0.01, 1))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(row, temperature, top_p):
    logits = torch.tensor([row], dtype=torch.float64)
    probabilities, tokens = nucleus(logits, temperature, top_p)
    plain = (logits / temperature).softmax(-1)[0]
    kept = tokens[0][probabilities[0] > 0]
    left_out = tokens[0][probabilities[0] == 0]
    mass = plain[kept].sum()
    assert mass >= top_p - 1e-12
    assert mass - plain[kept].min() < top_p, "one token less would reach top_p too"
    assert not len(left_out) or plain[left_out].max() <= plain[kept].min()
    torch.testing.assert_close(probabilities[0][: len(kept)], plain[kept] / mass)


def test_top_p_one_keeps_every_token():
    probabilities, tokens = nucleus(torch.randn(3, 50), 1.0, 1.0)
    assert (probabilities > 0).all()
    assert (tokens.sort(-1).values == torch.arange(50)).all()


def test_draws_follow_the_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20_000, 4)
    drawn = choose(logits, Sampling(temperature=1.0, top_p=0.9), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.015, rtol=0)


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([[0.0, 1.0]])
    cold, warm, hot = (nucleus(logits, t, 1.0)[0][0, 0].item() for t in (0.1, 1.0, 10.0))
    assert cold > 0.9999
    assert warm == pytest.approx(torch.tensor(1.0).sigmoid().item())
    assert 0.5 < hot < 0.53


def test_greedy_is_the_largest_logit_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert choose(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), GREEDY, generator).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), before)


def test_same_seed_same_tokens():
    logits = torch.randn(5, 100)
    first, second, other = (choose(logits, Sampling(1.0, 1.0), torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Sampling(**wrong)
