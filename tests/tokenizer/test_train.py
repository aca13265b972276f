"""Training a vocabulary, and extending one: sizes, kept ids, and what they do to compression."""

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.train import characters_per_token, extend, train
from tests.tokenizer.texts import ALL, CODE, SENTENCES
from tests.tokenizer.vocabularies import small_vocabulary

ENGLISH = [SENTENCES["english"], *CODE.values()]
OTHERS = [SENTENCES[name] for name in ("hindi", "thai", "japanese", "russian", "korean")]


def test_size_is_exact_and_training_repeats_itself():
    first, second = (train(iter(ENGLISH), 640) for _ in range(2))
    assert first.vocab_size == 640
    assert first.ranks == second.ranks
    assert sorted(first.ranks.values()) == list(range(384))


def test_trained_tokens_shorten_the_text():
    assert characters_per_token(small_vocabulary(), ALL.values()) > 1.2 * characters_per_token(train(ENGLISH, 512), ALL.values())


def test_extending_keeps_ids_and_helps_where_it_should():
    base = train(ENGLISH, 640)
    extended = extend(base, OTHERS * 3, 150)
    assert extended.n_bpe == base.n_bpe + 150
    assert all(extended.ranks[token] == rank for token, rank in base.ranks.items())
    assert extended.bos_id == extended.n_bpe
    assert characters_per_token(extended, OTHERS) > 1.3 * characters_per_token(base, OTHERS)
    assert characters_per_token(extended, ENGLISH) == pytest.approx(characters_per_token(base, ENGLISH), rel=0.02)
    for text in ALL.values():
        assert extended.decode(extended.encode(text)) == text


def test_extended_tokens_are_reached_by_merging():
    base = train(ENGLISH, 640)
    extended = extend(base, OTHERS * 3, 60)
    used = {id_ for text in OTHERS for id_ in extended.encode(text)}
    assert len([id_ for id_ in used if base.n_bpe <= id_ < extended.n_bpe]) > 30


@pytest.mark.parametrize("make, message", [
    (lambda: train(ENGLISH, 400), "at least 512"),
    (lambda: train(["a"], 1000), "yields only"),
    (lambda: extend(small_vocabulary(), ["xyzzy"], 5000), "yields only"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
