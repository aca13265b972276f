"""Divergence from the corpus: strange words go, however few they are in the corpus; length alone drops nothing."""

from random import Random

import numpy as np
import pytest

from megatron_llama3.curation.blocks.divergence import DivergenceFilter, WordDistribution
from megatron_llama3.curation.text.words import split_words
from tests.curation import planted
from tests.curation.steps import both_passes, document


def test_gibberish_and_other_languages_go_and_the_corpus_stays(tmp_path):
    rng = Random(0)
    good = [document(planted.prose(rng, rng.randint(4, 40)), f"good {i}") for i in range(80)]
    bad = [document(planted.gibberish(rng), "gibberish"), document(planted.RIGHTS["de"], "German")]
    kept, reasons = both_passes(DivergenceFilter(), [*good, *bad], str(tmp_path))
    assert reasons == {"gibberish": "divergent_words", "German": "divergent_words"}
    assert sorted(doc.id for doc in kept) == sorted(doc.id for doc in good)
    assert all(doc.metadata["word_divergence"] < 1.5 for doc in kept)


def test_each_language_is_a_corpus(tmp_path):
    """German documents do not stand out among English ones once they are labelled: they are few, but measured by themselves."""
    rng = Random(0)
    documents = [document(planted.prose(rng), f"{i}", language="en") for i in range(40)]
    documents += [document(planted.RIGHTS["de"], f"de {i}", language="de") for i in range(2)]
    assert both_passes(DivergenceFilter(), documents, str(tmp_path))[1] == {}


def test_expected_divergence_is_that_of_random_texts():
    counts = 1 + 1000 // np.arange(1, 2001)
    corpus = WordDistribution(counts)
    rng = np.random.default_rng(1)
    for words in (30, 100, 700):
        excesses = [corpus.excess(rng.choice(2000, words, p=counts / counts.sum())) for _ in range(200)]
        assert abs(np.mean(excesses)) < 0.1, words


def test_divergence_by_hand():
    """Half a, half b in the corpus, all a in the text: log 2, less what a text of this length shows anyway."""
    corpus = WordDistribution(np.array([5, 0, 5]))
    assert corpus.excess(np.zeros(64, int)) + corpus.expected(64) == pytest.approx(np.log(2))
    assert corpus.excess(np.ones(64, int)) + corpus.expected(64) == pytest.approx(np.log(20)), "a word that the corpus lacks is half a word"


def test_any_number_of_tasks_counts_the_same(tmp_path):
    texts = [planted.prose(Random(seed), 3) for seed in range(9)]
    sums = []
    for tasks in (1, 4):
        folder = str(tmp_path / str(tasks))
        both_passes(DivergenceFilter(), [document(text) for text in texts], folder, tasks)
        sums.append(np.load(tmp_path / str(tasks) / "corpus" / "00000.npz")["table"])
    assert (sums[0] == sums[1]).all()
    assert sums[0].sum() == sum(len(split_words(text)) for text in texts)


def test_short_texts_are_not_judged(tmp_path):
    block = DivergenceFilter(max_excess=-100.0, min_words=4)
    kept, reasons = both_passes(block, [document("x y z", "short"), document("x y z q", "long")], str(tmp_path))
    assert ([doc.id for doc in kept], reasons) == (["short"], {"long": "divergent_words"})
