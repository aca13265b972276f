"""Bulk tokenisation gives the ids of the reference tokenizer, text by text."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.data import preprocess_tokenize
from megatron_llama3.data.preprocess_tokenize import BulkTokenizer, PartEncoder
from megatron_llama3.tokenizer.llama3 import MAX_ENCODE_CHARS
from tests.tokenizer.texts import ALL, NASTY
from tests.tokenizer.vocabularies import TEXTS, meta_vocabulary, small_vocabulary


@functools.cache
def _bulk(vocabulary):
    return BulkTokenizer(vocabulary())


@pytest.mark.parametrize("vocabulary", [small_vocabulary, meta_vocabulary])
def test_real_text(vocabulary):
    for text in ALL.values():
        assert _bulk(vocabulary).encode(text).tolist() == vocabulary().encode(text)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_fuzzed_text(text):
    for vocabulary in (small_vocabulary, meta_vocabulary):
        assert _bulk(vocabulary).encode(text).tolist() == vocabulary().encode(text)


@pytest.mark.parametrize("text", ["x\u0c5c'sy", "\U00032aac's", "a\U00011de40000000", "\x00\ua7cf 1"])
def test_letters_that_only_gigatokens_unicode_knows(text):
    assert _bulk(meta_vocabulary).encode(text).tolist() == meta_vocabulary().encode(text)


@pytest.mark.slow
def test_every_code_point(monkeypatch):
    """A letter or digit that gigatoken and tiktoken see differently must be in the table; so must none that they see alike."""
    reference, bulk = meta_vocabulary().encoding, _bulk(meta_vocabulary)
    is_disputed = preprocess_tokenize._is_disputed
    monkeypatch.setattr(preprocess_tokenize, "_is_disputed", lambda *_: False)
    wrong = []
    for point in (*range(0xD800), *range(0xE000, 0x110000)):
        char = chr(point)
        text = f"\x00{char}'s a{char}00{char}00 {char} \n{char}\r"
        if (bulk.encode(text).tolist() != reference.encode_ordinary(text)) != is_disputed(char, char.encode()):
            wrong.append(hex(point))
    assert wrong == []


@pytest.mark.parametrize("text", [" " * 60_000 + "x", "a" * 60_001, "ab " * 150_000, "日本語。" * 110_000])
def test_long_text(text):
    assert _bulk(meta_vocabulary).encode(text).tolist() == meta_vocabulary().encode(text)


def test_special_tokens_only_where_asked():
    vocabulary, text = small_vocabulary(), NASTY["specials"]
    assert _bulk(small_vocabulary).encode(text).max() < vocabulary.n_bpe
    assert BulkTokenizer(vocabulary, parse_special=True).encode(text).tolist() == vocabulary.encode(text, allowed_special="all")


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 900_000), max_size=6))
def test_a_text_in_parts_gives_the_ids_of_the_whole(cuts):
    whole = ("ab\u0c5c's, 日本 123456 " * 60_000)[: MAX_ENCODE_CHARS * 2 + 17]
    received: list[np.ndarray] = []
    encoder = PartEncoder(_bulk(small_vocabulary), received.append)
    borders = [0, *sorted(cuts), len(whole)]
    for start, end in itertools.pairwise(borders):
        encoder.add(whole[start:end])
    encoder.finish()
    assert np.concatenate(received).tolist() == _whole_ids()
    assert encoder.characters == len(whole)


def _whole_ids(cache=[]):  # noqa: B006
    if not cache:
        cache.append(small_vocabulary().encode(("ab\u0c5c's, 日本 123456 " * 60_000)[: MAX_ENCODE_CHARS * 2 + 17]))
    return cache[0]
