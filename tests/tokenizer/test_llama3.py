"""The tokenizer against tiktoken, Meta's own class and Hugging Face, on real and fuzzed text."""

import json

import pytest
from hypothesis import given, settings

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.llama3 import SPECIAL_TOKENS, check_vocabulary_size, load_tokenizer
from megatron_llama3.tokenizer.vocabulary_files import huggingface_json, write_tiktoken
from tests.tokenizer.texts import ALL, NASTY
from tests.tokenizer.vocabularies import TEXTS, meta_model_path, meta_vocabulary, small_vocabulary


@pytest.fixture(scope="module")
def meta_tokenizer():
    meta_model_path()
    module = pytest.importorskip("llama_models.llama3.tokenizer")
    return module.Tokenizer.get_instance()


@pytest.fixture(scope="module")
def huggingface_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = meta_vocabulary()
    return tokenizers.Tokenizer.from_str(huggingface_json(vocabulary.ranks, {}))


def test_the_published_ids():
    vocabulary = meta_vocabulary()
    assert vocabulary.encode("This is a test sentence.", bos=True, eos=True) == [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert [vocabulary.encode(text) for text in ("\n\n", "user", "system", "assistant")] == [[271], [882], [9125], [78191]]
    assert (vocabulary.n_bpe, vocabulary.vocab_size) == (128000, 128256)
    ids = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_header_id, vocabulary.end_header_id)
    assert ids == (128000, 128001, 128004, 128006, 128007)
    assert (vocabulary.eom_id, vocabulary.eot_id, vocabulary.python_tag_id, vocabulary.image_id) == (128008, 128009, 128010, 128011)
    assert vocabulary.stop_ids == (128001, 128008, 128009)


def test_special_tokens_equal_metas(meta_tokenizer):
    assert meta_vocabulary().special_tokens == meta_tokenizer.special_tokens
    assert len(set(SPECIAL_TOKENS)) == 256


@pytest.mark.parametrize("name", ALL)
def test_real_text(name, meta_tokenizer, huggingface_tokenizer):
    ids = meta_vocabulary().encode(ALL[name])
    assert ids == meta_tokenizer.encode(ALL[name], bos=False, eos=False)
    assert ids == huggingface_tokenizer.encode(ALL[name], add_special_tokens=False).ids
    assert meta_vocabulary().decode(ids) == ALL[name]


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_fuzzed_text(text, meta_tokenizer, huggingface_tokenizer):
    ids = meta_vocabulary().encode(text)
    assert ids == meta_tokenizer.encode(text, bos=False, eos=False)
    assert ids == huggingface_tokenizer.encode(text, add_special_tokens=False).ids
    assert meta_vocabulary().decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_fuzzed_text_with_a_vocabulary_trained_here(text):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = small_vocabulary()
    ids = vocabulary.encode(text)
    assert max(ids, default=0) < vocabulary.n_bpe
    assert vocabulary.decode(ids) == text
    assert ids == tokenizers.Tokenizer.from_str(_small_json()).encode(text, add_special_tokens=False).ids


def _small_json(cache=[]):  # noqa: B006
    if not cache:
        cache.append(huggingface_json(small_vocabulary().ranks, {}))
    return cache[0]


@pytest.mark.parametrize("text", [" " * 60_000 + "x", "a" * 60_001, "ab " * 150_000, "x\n" * 12_500 + "y" * 30_000, "日" * 410_000])
def test_long_input_is_cut_as_meta_cuts_it(text, meta_tokenizer):
    assert meta_vocabulary().encode(text) == meta_tokenizer.encode(text, bos=False, eos=False)


def test_spelled_special_tokens_are_text_unless_asked():
    vocabulary, text = meta_vocabulary(), NASTY["specials"]
    assert max(vocabulary.encode(text)) < vocabulary.n_bpe
    everything = vocabulary.encode(text, allowed_special="all")
    found = [id_ for id_ in everything if id_ >= vocabulary.n_bpe]
    assert found == [128009, 128000, 128001, vocabulary.special_tokens["<|reserved_special_token_7|>"]]
    assert [id_ for id_ in vocabulary.encode(text, allowed_special={"<|eot_id|>"}) if id_ >= vocabulary.n_bpe] == [128009]
    assert vocabulary.decode(everything) == text


def test_every_form_of_file_gives_the_same_tokenizer(tmp_path):
    vocabulary = small_vocabulary()
    vocabulary.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (loaded.ranks, loaded.special_tokens) == (vocabulary.ranks, vocabulary.special_tokens)


def test_hugging_faces_names_of_reserved_tokens_are_kept(tmp_path):
    vocabulary = small_vocabulary()
    names = dict(vocabulary.special_tokens)
    names["<|reserved_special_token_247|>"] = names.pop("<|reserved_special_token_245|>")
    (tmp_path / "tokenizer.json").write_text(huggingface_json(vocabulary.ranks, names))
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_tokens == names
    assert loaded.eot_id == vocabulary.eot_id


def test_decoding_broken_utf8_does_not_fail():
    vocabulary = small_vocabulary()
    assert vocabulary.decode([vocabulary.ranks[b"\xe6"]]) == "\ufffd"
    assert vocabulary.decode_bytes([vocabulary.ranks[b"\xe6"]]) == b"\xe6"


def _foreign_pattern(text):
    data = json.loads(text)
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    return json.dumps(data)


def _specials_elsewhere(text):
    data = json.loads(text)
    data["added_tokens"][0]["id"], data["added_tokens"][1]["id"] = data["added_tokens"][1]["id"], data["added_tokens"][0]["id"]
    return json.dumps(data)


@pytest.mark.parametrize("spoil, message", [
    (_foreign_pattern, "not a Llama 3 tokenizer"),
    (_specials_elsewhere, "begin_of_text"),
    (lambda text: text[:100], "JSON"),
])  # fmt: skip
def test_a_foreign_tokenizer_json_is_refused(tmp_path, spoil, message):
    small_vocabulary().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    vocabulary = small_vocabulary()
    vocabulary.save(tmp_path)
    foreign = tmp_path / "foreign.json"  # of another family: what counts is its largest id
    foreign.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 1023}]}))
    for path in (tmp_path, tmp_path / "tokenizer.model", tmp_path / "tokenizer.json", foreign):
        check_vocabulary_size(path, vocabulary.vocab_size)
        with pytest.raises(UserError, match=r"--tokenizer-model .* has 1024 entries, --vocab-size 1023 is smaller"):
            check_vocabulary_size(path, vocabulary.vocab_size - 1)
    foreign.write_text("[]")
    with pytest.raises(UserError, match=r"foreign\.json: not a tokenizer\.json"):
        check_vocabulary_size(foreign, 1)


def test_a_damaged_tokenizer_model_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match="no such tokenizer file"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="neither"):
        load_tokenizer(tmp_path)
    write_tiktoken(path, small_vocabulary().ranks)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])  # the last line loses its rank's last digit
    with pytest.raises(UserError, match="without gaps"):
        load_tokenizer(path)
    path.write_bytes(whole + b"not base64 at all\n")
    with pytest.raises(UserError, match="line 769"):
        load_tokenizer(path)
    path.write_bytes(b"\n".join(whole.splitlines()[:100]))
    with pytest.raises(UserError, match="no token for byte"):
        load_tokenizer(path)
    path.write_bytes(whole + b"eHl6enk= 5\n")
    with pytest.raises(UserError, match="without gaps"):
        load_tokenizer(path)
