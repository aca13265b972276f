"""What is written for transformers gives the same ids there."""

import pytest

from megatron_llama3.tokenizer.chat_format import CHAT_TEMPLATE, ChatFormat, Message
from megatron_llama3.tokenizer.merges import merges_of
from tests.tokenizer.texts import ALL
from tests.tokenizer.vocabularies import meta_vocabulary, small_vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [small_vocabulary, meta_vocabulary])
def test_transformers_reads_the_saved_folder(tmp_path, vocabulary):
    transformers = pytest.importorskip("transformers")
    vocabulary = vocabulary()
    vocabulary.save(tmp_path, CHAT_TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    assert len(theirs) == vocabulary.vocab_size
    for text in ALL.values():
        assert theirs(text).input_ids == vocabulary.encode(text, bos=True, allowed_special="all")
        assert theirs.decode(vocabulary.encode(text)) == text
    dialog = [Message("system", "Be brief."), Message("user", "Hi!"), Message("assistant", "Hello.")]
    spoken = [{"role": message.role, "content": message.content} for message in dialog]
    ids = theirs.apply_chat_template(spoken, add_generation_prompt=True, return_dict=False)
    assert ids == ChatFormat(vocabulary).encode_dialog(dialog, generation_prompt=True)


def test_merges_are_all_splits_in_rank_order():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5}
    assert merges_of(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]
