"""The blend is exact within one sequence at every point, and goes on from its counts alone."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.data.blend import integer_weights, next_sources


def worst_error(weights: list[int], drawn: np.ndarray) -> Fraction:
    """The largest |given_i - w_i n| over sources and n, exact: where products pass 64 bits, both wrap around alike."""
    total, n = sum(weights), np.arange(1, len(drawn) + 1)
    return Fraction(max(int(np.abs(np.cumsum(drawn == i) * total - n * weight).max()) for i, weight in enumerate(weights)), total)


_weights = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 100_000)), min_size=1, max_size=12).filter(any)


@settings(max_examples=150, deadline=None)
@given(weights=_weights, cuts=st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_exact_within_one_sequence_and_resumable_anywhere(weights, cuts):
    weights = integer_weights(weights)
    whole = next_sources(weights, [0] * len(weights), sum(cuts))
    assert worst_error(weights, whole) < 1
    given_so_far, parts = np.zeros(len(weights), dtype=int), []
    for count in cuts:
        parts.append(next_sources(weights, given_so_far.tolist(), count))
        given_so_far += np.bincount(parts[-1], minlength=len(weights))
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("weights", [[0.5] + [0.5 / 63] * 63, list(np.random.default_rng(0).random(64) ** 8), [1] * 64])
def test_exact_for_64_sources(weights):
    weights = integer_weights(weights)
    assert worst_error(weights, next_sources(weights, [0] * 64, 100_000)) < 1


@pytest.mark.parametrize("slot", [0, 10**6, 10**9, 10**12])
def test_exact_for_weights_whose_products_pass_64_bits(slot):
    """Against the definition, in Python's integers; up to a slot that no run reaches."""
    weights = integer_weights([*map(float, np.random.default_rng(1).random(6)), 1e-9])
    total = sum(weights)
    assert total > 1 << 53
    counts = [slot * weight // total for weight in weights]
    largest_rests = sorted(range(7), key=lambda i: slot * weights[i] % total, reverse=True)
    for i in largest_rests[: slot - sum(counts)]:
        counts[i] += 1
    drawn = next_sources(weights, counts, 2000)
    for n, source in enumerate(drawn, start=slot + 1):
        counts[source] += 1
        assert all(abs(count * total - n * weight) < total for count, weight in zip(counts, weights))


def test_exact_after_two_billion_sequences():
    weights = integer_weights(["0.123456789", "0.876543211"])
    before = [2 * 123_456_789, 2 * 876_543_211]  # two whole periods: the books are even
    drawn = next_sources(weights, before, 1000)
    np.testing.assert_array_equal(drawn, next_sources(weights, [0, 0], 1000))


def test_a_source_of_weight_0_gives_nothing():
    assert set(next_sources([0, 3, 0, 1], [0, 0, 0, 0], 1000)) == {1, 3}


def test_integer_weights_take_decimals_exactly():
    assert integer_weights(["0.3", "0.7"]) == [3, 7]
    assert integer_weights([30, Fraction(70), "0"]) == [3, 7, 0]
    huge = integer_weights(["0.1234567890123", "0.5", "1e-30"])
    assert sum(huge) <= 1 << 60
    assert huge[2] == 1
    assert huge[0] / huge[1] == pytest.approx(0.2469135780246, rel=1e-15)


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], ["a"]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError):
        integer_weights(weights)
