"""The report's numbers on text whose answer is known."""

import math

import pytest

from tools.quickstart_report import accepted_share, longest_copied_run, prompts_and_rest, spread, tokenizes, unigram_entropy


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
    source = "abcdefgh\0ijklmnop"
    assert longest_copied_run("xxcdefxxijklxx", source) == "cdef"
    assert longest_copied_run("ghij", source) == "gh"
    assert longest_copied_run("", source) == longest_copied_run("XYZ", source) == ""


def test_prompts_end_with_a_line():
    document = "a" * 290 + "\n" + "b" * 50 + "\nrest\n"
    assert prompts_and_rest([document]) == ([document[:342]], ["rest\n"])


def test_unigram_entropy_of_equal_counts():
    assert unigram_entropy([1, 2, 3, 4, 4, 3, 2, 1]) == pytest.approx(math.log(4))


def test_spread_is_even():
    assert spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert spread([1, 2], 4) == [1, 2]
