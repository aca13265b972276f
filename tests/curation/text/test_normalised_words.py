"""Words are datatrove's, only faster; n-grams stay inside their text."""

import numpy as np
from datatrove.utils.text import simplify_text
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.curation.text.normalised_words import WordHashes, normalised_words, word_ngrams

_SPACED = st.text(st.characters(max_codepoint=0x5FF, exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(_SPACED)
def test_words_are_those_of_simplify_text(text):
    assert [word for token in text.split() for word in normalised_words(token)] == simplify_text(text).split()


def test_case_accents_numbers_and_punctuation_do_not_matter():
    words = WordHashes()
    assert words.of_text("Café, no. 12,5!") == words.of_text("cafe no 7")
    assert words.of_text("cafe no 7") != words.of_text("no cafe 7")
    assert words.of_text("--- *** ---") == b""


def test_scripts_without_spaces_are_split_into_characters():
    assert normalised_words("手引書を読むlinux") == ["手", "引", "書", "を", "読", "む", "linux"]
    assert len(normalised_words("ภาษาไทย")) == 7


def test_a_small_memory_gives_the_same_hashes(monkeypatch):
    text = " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200)) * 2
    expected = WordHashes().of_text(text)
    monkeypatch.setattr("megatron_llama3.curation.text.normalised_words._MAX_KNOWN", 8)
    words = WordHashes()
    assert words.of_text(text) == expected
    assert len(words) <= 8


def test_ngrams_stay_inside_their_text():
    words = WordHashes()
    texts = [words.of_text(text) for text in ("a b c d", "", "x y", "a b c d e", "b c d e")]
    hashes, begins = word_ngrams(texts, 4)
    grams = [set(hashes[begins[i] : begins[i + 1]].tolist()) for i in range(len(texts))]
    assert [len(one) for one in grams] == [1, 0, 1, 2, 1]
    assert grams[3] == grams[0] | grams[4]
    assert len(set.union(*grams)) == 3


def test_order_inside_an_ngram_matters():
    words = WordHashes()
    hashes, _ = word_ngrams([words.of_text("a b c"), words.of_text("c b a"), words.of_text("b a c")], 3)
    assert len(np.unique(hashes)) == 3
