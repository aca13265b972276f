"""Tokenizers of other families against transformers, which reads the same folders by its own rules."""

import json
import shutil

import pytest
import tokenizers
from hypothesis import given, settings
from transformers import AutoTokenizer

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.foreign_tokenizer import ForeignTokenizer, open_tokenizer
from megatron_llama3.tokenizer.llama3 import Tokenizer
from tests.tokenizer.texts import ALL
from tests.tokenizer.vocabularies import TEXTS, small_vocabulary

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> tokenizers.Tokenizer:
    """As SmolLM2's and GPT-2's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ALL.values(), tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2's: a mark for a blank, bytes for what the vocabulary lacks, a BOS before each text."""
    blanks = tokenizers.normalizers.Replace(" ", "▁")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = blanks
    specials = SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(list(ALL.values())[:4], tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=specials))
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    made = tokenizers.Tokenizer.from_str(json.dumps(state))
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return made


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda make: make.__name__)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_ids_and_text_are_those_of_transformers(both, text):
    ours, theirs = both
    ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.encode(text, bos=True) == ids
    assert ours.decode(ids) == theirs.decode(ids)


def test_what_ends_a_text_and_how_many_entries(both):
    ours, theirs = both
    assert (ours.stop_ids, ours.vocab_size) == ((theirs.eos_token_id,), len(theirs))


def test_a_special_token_spelled_in_a_text_stays_text(folder):
    ours = open_tokenizer(folder)
    ids = ours.encode("a<|im_end|>b")
    assert not set(ids) & {ours._library.token_to_id(token) for token in SPECIALS[1:]}
    assert ours.decode(ids) == "a<|im_end|>b"
    assert ours.decode([ours.stop_ids[0]]) == "<|im_end|>"


def test_llama_3s_own_file_is_read_as_such(tmp_path):
    small_vocabulary().save(tmp_path)
    assert isinstance(open_tokenizer(tmp_path), Tokenizer)
    assert isinstance(open_tokenizer(tmp_path / "tokenizer.json"), Tokenizer)
    ids = small_vocabulary().encode(ALL["german"], bos=True)
    assert ForeignTokenizer(tmp_path / "tokenizer.json").encode(ALL["german"], bos=True) == ids  # the library agrees


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", "[", r"tokenizer\.json: not valid JSON"),
    ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer\.json with a vocabulary"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', r"tokenizer\.json: the tokenizers library"),
    ("tokenizer_config.json", '{"eos_token": "<nobody>"}', r"tokenizer_config\.json: eos_token '<nobody>' is no token of tokenizer\.json"),
    ("tokenizer_config.json", '{"eos_token": 3}', r"eos_token '3' is no token"),
])  # fmt: skip
def test_what_is_no_tokenizer_is_one_line(folder, tmp_path, name, content, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        open_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_unknown_id_is_no_text(folder):
    ours = open_tokenizer(folder)
    with pytest.raises(KeyError):
        ours.decode([ours.vocab_size])
