"""The merges that gigatoken is given, and the cache that they are kept in."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.tokenizer import bulk_encoder
from megatron_llama3.tokenizer.bulk_encoder import load_encoder
from megatron_llama3.tokenizer.merges import merges_of, reachable_merges
from megatron_llama3.tokenizer.train import train
from megatron_llama3.tokenizer.vocabulary_files import write_tiktoken
from tests.tokenizer.texts import SENTENCES
from tests.tokenizer.vocabularies import small_vocabulary

TEXT = SENTENCES["german"]


def _merged(text, allowed, ranks):
    """Byte pair encoding with these merges only, lowest rank first."""
    parts = [bytes([byte]) for byte in text]
    while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if (a, b) in allowed]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


_BYTES = st.lists(st.sampled_from(b"abc"), min_size=2, max_size=7).map(bytes)


@settings(max_examples=400, deadline=None)
@given(tokens=st.lists(_BYTES, max_size=12, unique=True), text=st.lists(st.sampled_from(b"abc"), max_size=40).map(bytes))
def test_reachable_merges_encode_as_all_merges_do(tokens, text):
    """Vocabularies in any order: a token may come before its parts, as where one was extended."""
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b"c", *tokens])}
    everything, reachable = merges_of(ranks), reachable_merges(ranks)
    assert set(reachable) <= set(everything)
    assert len({a + b for a, b in reachable}) == len(reachable)
    assert _merged(text, set(reachable), ranks) == _merged(text, set(everything), ranks)


def test_a_token_behind_a_later_one_is_reached():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"d": 3, b"abcd": 4, b"bcd": 5, b"cd": 6, b"ab": 7, b"abc": 8}
    assert (b"ab", b"cd") not in reachable_merges(ranks)  # no merge: its parts are tokens, but (a, bcd) comes first
    assert (b"a", b"bcd") in reachable_merges(ranks)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A tokenizer file and the cache's folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tiktoken(tmp_path / "tokenizer.model", small_vocabulary().ranks)
    return tmp_path / "tokenizer.model", tmp_path / "cache" / "megatron_llama3"


def _ids(path):
    return load_encoder(small_vocabulary(), path).encode(TEXT).tolist()


def test_the_second_start_takes_the_merges_from_the_cache(files, monkeypatch):
    path, cache = files
    expected = small_vocabulary().encode(TEXT)
    assert _ids(path) == expected
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(bulk_encoder, "reachable_merges", lambda *_: pytest.fail("spelled out again"))
    assert _ids(path) == expected
    assert _ids(path.parent) == expected


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:], lambda data: b""])
def test_a_damaged_cache_is_made_again(files, spoil):
    path, cache = files
    _ids(path)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(spoil(whole))
    assert _ids(path) == small_vocabulary().encode(TEXT)
    assert kept.read_bytes() == whole


def test_another_vocabulary_is_not_served(files):
    path, _ = files
    _ids(path)
    other = train([TEXT], 560)
    write_tiktoken(path, other.ranks)
    assert load_encoder(other, path).encode(TEXT).tolist() == other.encode(TEXT)


def test_without_a_place_to_write_it_goes_on(files, monkeypatch):
    path, cache = files
    cache.parent.write_text("a file where the cache should be")
    assert _ids(path) == small_vocabulary().encode(TEXT)
