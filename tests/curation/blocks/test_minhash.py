"""Near-duplicates go, the earliest copy and everything else stays, under any number of tasks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.minhash import MinhashDedup, components, signatures
from megatron_llama3.curation.text.normalised_words import WordHashes
from tests.curation.runs import documents, prose, through


def changed(text: str, words: int) -> str:
    """The last `words` words replaced: of n words with 5-grams, the similarity is (n - 4 - words) / (n - 4 + words)."""
    tokens = text.split(" ")
    return " ".join(tokens[:-words] + [f"other{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(words)])


@pytest.fixture
def planted():
    """(texts, numbers that must go): 40 originals; copies with other case and punctuation, or close to 0.9; others below the threshold."""
    texts = [prose(seed).replace("\n", " ") for seed in range(40)]
    near = [texts[3].upper(), texts[5].replace(" ", ", "), changed(texts[7], 5)]
    far = [changed(texts[9], 40), changed(texts[11], 60)]
    return [*texts, *near, "", *far, ""], {40, 41, 42}


@pytest.mark.parametrize("tasks", [1, 3])
def test_near_duplicates_go_and_the_rest_stays(planted, tmp_path, tasks):
    texts, must_go = planted
    kept = through(MinhashDedup(), documents(texts), tmp_path, tasks)
    assert {int(document.id) for document in kept} == set(range(len(texts))) - must_go


def test_the_reason_is_written(planted, tmp_path):
    block, given_documents = MinhashDedup(), documents(planted[0])
    through(block, given_documents, tmp_path, 1)
    assert block.apply(str(tmp_path)).reason == "near_duplicate"


def test_the_threshold_is_meant(tmp_path):
    text = prose(1).replace("\n", " ")
    texts = [text, changed(text, 12)]  # similarity 104 / 128 = 0.81
    assert len(through(MinhashDedup(threshold=0.95), documents(texts), tmp_path / "high")) == 2
    assert len(through(MinhashDedup(threshold=0.7), documents(texts), tmp_path / "low")) == 1


def test_short_texts_are_compared_as_wholes(tmp_path):
    kept = through(MinhashDedup(), documents(["Not found.", "not FOUND", "Found."]), tmp_path)
    assert [document.id for document in kept] == ["0", "2"]


def test_within_a_language_only(tmp_path):
    text = prose(2)
    given_documents = documents([text, text, text], language=["de", "en", "de"])
    assert [d.id for d in through(MinhashDedup(within="language"), given_documents, tmp_path)] == ["0", "1"]


def test_chinese_without_spaces(tmp_path):
    text = "本手册页描述内核为进程间通信提供的接口以及它们在不同文件系统上的行为" * 3
    assert len(through(MinhashDedup(), documents([text, text + "。", text[::-1]]), tmp_path)) == 2


def test_slots_agree_as_often_as_the_sets_are_similar():
    words, shares = WordHashes(), []
    for seed in range(30):
        text = prose(seed, 500).replace("\n", " ")
        one, other = signatures([words.of_text(text), words.of_text(changed(text, 50))], 5, 256, 1)
        shares.append(np.mean(one == other))
    assert abs(np.mean(shares) - 446 / 546) < 0.02  # four standard errors of 30 estimates by 256 slots


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=40))
def test_components_are_those_of_a_union_find(edges):
    root = {}

    def find(node):
        while root.setdefault(node, node) != node:
            node = root[node]
        return node

    for one, other in edges:
        low, high = sorted((find(one), find(other)))
        root[high] = low
    expected = sorted((node, find(node)) for node in root if find(node) != node)
    assert components(np.array(edges, np.int64).reshape(-1, 2)).tolist() == [list(pair) for pair in expected]


@pytest.mark.parametrize("arguments", [{"threshold": 0}, {"threshold": 1.5}, {"rows": 3}, {"bands": 0}, {"ngram": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        MinhashDedup(**arguments)
