"""Which source gives each sequence: after any n sequences, source i of weight w_i has given within one of w_i * n.

This is the scheduling of unit tasks: the j-th sequence of source i may not come before slot floor((j-1) / w_i), or the source would be one
ahead, nor after slot ceil(j / w_i) - 1, or it would be one behind. Among those that may come, the one with the earliest deadline goes
first; for such windows that always meets every deadline (Steiner and Yeomans 1993, "Level schedules for mixed-model, just-in-time
processes"). Picking the source that is furthest behind, as Megatron does, leaves a source up to 1.8 behind (found by trying random
weights). Weights are integers here, so nothing rounds.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_MAX_SUM = 1 << 60  # what _floor_of_product allows


def integer_weights(weights: Sequence[str | int | float | Fraction]) -> list[int]:
    """The smallest integers in these proportions; decimal strings are taken exactly. Above a sum of 2^60, the nearest that fit.

    Raises ValueError for a weight that is negative or no number, and where none is positive.
    """
    exact = [Fraction(w) for w in weights]
    total = sum(exact)
    if min(exact) < 0 or total == 0:
        raise ValueError(f"weights {[str(w) for w in weights]}: none may be negative, and one must be positive")
    scale = math.lcm(*(w.denominator for w in exact))
    integers = [int(w * scale) for w in exact]
    integers = [w // math.gcd(*integers) for w in integers]
    if sum(integers) <= _MAX_SUM:
        return integers
    return [max(1, int(w / total * (_MAX_SUM - len(exact)))) if w else 0 for w in exact]


def next_sources(weights: Sequence[int], given: Sequence[int], count: int) -> np.ndarray:
    """The sources of the next `count` sequences.

    weights: `integer_weights`; given: how many sequences each source has given since these weights began, all by this function.
    Returns int64 [count].
    """
    if sum(w > 0 for w in weights) == 1:
        return np.full(count, np.argmax(weights), dtype=np.int64)
    total, slot = sum(weights), sum(given)
    period = slot // total  # at every multiple of the sum the books are even: start counting there
    slot -= period * total
    releases, deadlines, sources = [], [], []
    for source, weight in enumerate(weights):
        if weight:
            first = given[source] - period * weight
            last = -(-(slot + count) * weight // total)
            j = np.arange(first, last, dtype=np.int64)
            releases.append(_floor_of_product(j, total, weight))
            deadlines.append(-_floor_of_product(-(j + 1), total, weight))
            sources.append(np.full(len(j), source, dtype=np.int64))
    release = np.concatenate(releases)
    key = np.concatenate(deadlines) * len(weights) + np.concatenate(sources)
    order = np.argsort(release, kind="stable")
    return np.array(_earliest_deadline_first(release[order], key[order], slot, count), dtype=np.int64) % len(weights)


def _floor_of_product(j: np.ndarray, total: int, weight: int) -> np.ndarray:
    """floor(j * total / weight), exact though j * total may pass 64 bits; total below 2^61, the results below 2^51. int64 [n]."""
    estimate = np.floor(j * (total / weight)).astype(np.int64)
    # Both products wrap around alike, so their difference, at most a few weights, is exact.
    rest = j * np.int64(total) - estimate * np.int64(weight)
    return estimate + rest // weight


def _earliest_deadline_first(release: np.ndarray, key: np.ndarray, slot: int, count: int) -> list[int]:
    """key: deadline * sources + source, sorted by release. Returns the keys in the order of their slots."""
    released = np.searchsorted(release, np.arange(slot, slot + count), side="right").tolist()
    keys = key.tolist()
    ready: list[int] = []
    chosen = []
    push, pop, done = heapq.heappush, heapq.heappop, 0
    for until in released:
        while done < until:
            push(ready, keys[done])
            done += 1
        chosen.append(pop(ready))
    return chosen
