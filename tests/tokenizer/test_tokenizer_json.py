"""A tokenizer.json gives the ids that `tokenizers` gives, or is refused in one line: whatever part of it is changed."""

import copy
import json

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.llama3 import check_vocabulary_size, load_tokenizer
from tests.tokenizer.texts import ALL
from tests.tokenizer.vocabularies import small_vocabulary


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_vocabulary().save(folder)
    return json.loads((folder / "tokenizer.json").read_text())


def steps(data: dict) -> list[dict]:
    return data["pre_tokenizer"]["pretokenizers"]


def merge_order(data: dict) -> None:
    data["model"]["merges"].reverse()


def one_merge_less(data: dict) -> None:
    whole = max(data["model"]["vocab"].items(), key=lambda item: item[1] if item[1] < small_vocabulary().n_bpe else -1)[0]
    data["model"]["merges"] = [merge for merge in data["model"]["merges"] if "".join(merge.split(" ")) != whole]


# What gives other ids, or could.
OTHER = {
    "digits": lambda d: steps(d).insert(1, {"type": "Digits", "individual_digits": True}),
    "punctuation": lambda d: steps(d).insert(1, {"type": "Punctuation", "behavior": "Isolated"}),
    "a second split": lambda d: steps(d).insert(1, {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}),
    "removed": lambda d: steps(d)[0].update(behavior="Removed"),
    "merged with the previous": lambda d: steps(d)[0].update(behavior="MergedWithPrevious"),
    "inverted": lambda d: steps(d)[0].update(invert=True),
    "another pattern": lambda d: steps(d)[0]["pattern"].update(Regex=r"\w+"),
    "a string, no pattern": lambda d: steps(d)[0].update(pattern={"String": " "}),
    "a prefix space": lambda d: steps(d)[1].update(add_prefix_space=True),
    "GPT-2's pattern too": lambda d: steps(d)[1].update(use_regex=True),
    "only bytes": lambda d: d.update(pre_tokenizer=steps(d)[1]),
    "other order": lambda d: steps(d).reverse(),
    "nothing cut": lambda d: d.update(pre_tokenizer=None),
    "lower case": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "cut short": lambda d: d.update(truncation={"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
    "padded": lambda d: d.update(padding={"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}),
    "dropout": lambda d: d["model"].update(dropout=0.1),
    "a prefix of parts": lambda d: d["model"].update(continuing_subword_prefix="##"),
    "a suffix of words": lambda d: d["model"].update(end_of_word_suffix="</w>"),
    "merges in another order": merge_order,
    "a merge less": one_merge_less,
    "a merge of no token": lambda d: d["model"]["merges"].append("0 \u0120"),
    "words": lambda d: d["model"].update(type="WordLevel"),
    "a special token that eats spaces": lambda d: d["added_tokens"][9].update(lstrip=True),
    "a special token as a whole word": lambda d: d["added_tokens"][9].update(single_word=True),
}
BROKEN = {
    "added_tokens null": lambda d: d.update(added_tokens=None),
    "no added_tokens": lambda d: d.pop("added_tokens"),
    "an added token without id": lambda d: d["added_tokens"][0].pop("id"),
    "an id that is text": lambda d: d["added_tokens"][0].update(id="x"),
    "an id that is a list": lambda d: d["model"]["vocab"].update(a=[1]),
    "an id that is no whole number": lambda d: d["model"]["vocab"].update(a=0.5),
    "no pattern": lambda d: steps(d)[0].pop("pattern"),
    "a step that is text": lambda d: steps(d).insert(0, "Split"),
    "no model": lambda d: d.pop("model"),
    "a model that is a list": lambda d: d.update(model=[]),
    "no vocab": lambda d: d["model"].pop("vocab"),
    "no merges": lambda d: d["model"].pop("merges"),
    "merges of three": lambda d: d["model"]["merges"].append("a b c"),
    "merges of numbers": lambda d: d["model"]["merges"].append([1, 2]),
    "merges of other letters": lambda d: d["model"]["merges"].append("\u4e00 a"),
}


@pytest.mark.parametrize("change", [*OTHER.values(), *BROKEN.values()], ids=[*OTHER, *BROKEN])
def test_another_tokenizer_is_refused_in_one_line(good, tmp_path, change):
    changed = copy.deepcopy(good)
    change(changed)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"tokenizer\.json: ") as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "3", '{"model": ', "\ufeff", '{"model": {"vocab": 1' + "0" * 5000 + "}}"])
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    for read in (load_tokenizer, lambda path: check_vocabulary_size(path, 10)):
        with pytest.raises(UserError, match=r"tokenizer\.json: ") as error:
            read(path)
        assert "\n" not in str(error.value)


# What gives the same ids.
SAME = {
    "as it was": lambda d: None,
    "merges as pairs": lambda d: d["model"].update(merges=[merge.split(" ") for merge in d["model"]["merges"]]),
    "another post-processor": lambda d: d.update(post_processor=None),
    "an unknown token": lambda d: d["model"].update(unk_token="!"),
    "without trim_offsets": lambda d: steps(d)[1].pop("trim_offsets"),
    "keys that say nothing": lambda d: d["model"].update(dropout=0.0, continuing_subword_prefix="", end_of_word_suffix=""),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_ids_are_those_of_tokenizers(good, tmp_path, change):
    from tokenizers import Tokenizer

    changed = copy.deepcopy(good)
    change(changed)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed))
    ours = load_tokenizer(path)
    if "trim_offsets" in steps(changed)[1]:  # tokenizers wants it
        theirs = Tokenizer.from_file(str(path))
        for text in ALL.values():
            assert ours.encode(text, allowed_special="all") == theirs.encode(text, add_special_tokens=False).ids
