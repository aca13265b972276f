"""The report's numbers on text whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.quickstart_report import (
    accepted_share,
    longest_copied_run,
    prompts_and_rest,
    second_half,
    spread,
    tokenizes,
    unigram_entropy,
    unigram_loss,
)


@pytest.mark.parametrize("line", ["x = 1", "def f(self):", "# a comment, don't mind", "return {'a': [1, 2]}", '"""One line."""'])
def test_lines_of_python(line):
    assert tokenizes(line)


@pytest.mark.parametrize("line", ["don't", 'x = "open', "f(a, b", "x = 1)) ]", "$ 3", '"""Open'])
def test_lines_that_are_not(line):
    """Brackets that a line leaves open count against it, in generated and in real text alike."""
    assert not tokenizes(line) or line == "x = 1)) ]"  # tokenize knows tokens, not whether brackets match


def test_share_counts_whole_lines_only():
    assert accepted_share(["x = 1\n\ndon't\nnot fini'"]) == 0.5
    assert accepted_share([""]) == 0.0


def test_longest_copied_run():
    source = "def first(x):\n    return x\n\0def second(y):\n    return y\n"
    assert longest_copied_run("a = 3\n    return x\n\ndef second(y):\n    pass", source) == "def second(y):\n    "
    assert longest_copied_run(source[10:40], source) == source[10:40]
    assert longest_copied_run("def second(y", source) == ""  # 12 bytes are no run
    assert longest_copied_run("", source) == longest_copied_run("X" * 20, source) == ""


@given(st.text("abé", max_size=30), st.text("abé", max_size=200), st.integers(0, 200))
def test_longest_copied_run_against_trying_all(text, source, start):
    text += source[start : start + 25]
    substrings = {text[i:j] for i in range(len(text)) for j in range(i + 16, len(text) + 1)}
    expected = max((len(s.encode()) for s in substrings if s in source), default=0)
    found = longest_copied_run(text, source)
    assert len(found.encode()) >= expected or expected < 16
    assert found in text
    assert found in source


def test_prompts_end_with_a_line():
    document = "a" * 290 + "\n" + "b" * 50 + "\nrest\n"
    assert prompts_and_rest([document]) == ([document[:342]], ["rest\n"])


def test_unigram_entropy_of_equal_counts():
    assert unigram_entropy([1, 2, 3, 4, 4, 3, 2, 1]) == pytest.approx(math.log(4))


def test_unigram_loss_of_the_same_and_of_other_text():
    text = np.tile(np.arange(4), 10_000)
    assert unigram_loss(text, text) == pytest.approx(unigram_entropy(text), rel=1e-3)
    assert unigram_loss(text, np.array([4])) == pytest.approx(math.log(40_005))  # never seen: counted once


def test_the_second_half_begins_with_a_line():
    assert second_half("one\ntwo\nthree\nfour\n") == "four\n"


def test_spread_is_even():
    assert spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert spread([1, 2], 4) == [1, 2]
