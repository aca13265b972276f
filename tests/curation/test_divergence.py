"""Divergence from the corpus: strange words go, however few they are in the corpus; length alone drops nothing."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.divergence import CountWords, DivergenceFilter, DropDivergent, WordDistribution, read_corpora
from tests.curation import planted
from tests.curation.steps import both_passes, document, judge


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
    counts = Counter({f"w{i}": 1 + 1000 // (i + 1) for i in range(2000)})
    corpus = WordDistribution(counts)
    rng = np.random.default_rng(1)
    names, shares = list(counts), np.array(list(counts.values())) / counts.total()
    for words in (30, 100, 700):
        excesses = [corpus.excess([names[i] for i in rng.choice(len(names), words, p=shares)]) for _ in range(200)]
        assert abs(np.mean(excesses)) < 0.1, words


def test_divergence_by_hand():
    """Half a, half b in the corpus, all a in the text: log 2, less what a text of this length shows anyway."""
    corpus = WordDistribution(Counter(a=5, b=5))
    assert corpus.excess(["a"] * 64) + corpus.expected(64) == pytest.approx(np.log(2))


def test_short_texts_are_not_judged_and_missing_counts_are_an_error(tmp_path):
    list(CountWords(str(tmp_path)).run(iter([document("a b c")]), 0, 2))
    with pytest.raises(UserError, match="has the counts of 1 of 2 tasks"):
        read_corpora(str(tmp_path))
    list(CountWords(str(tmp_path)).run(iter([]), 1, 2))
    step = DropDivergent(str(tmp_path), max_excess=-100.0, min_words=4)
    assert judge(step, "x y z")[0] is None
    assert judge(step, "x y z q")[0] == "divergent_words"
