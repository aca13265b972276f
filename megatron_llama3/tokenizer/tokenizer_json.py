"""Hugging Face's `tokenizer.json` as Llama 3's tokenizer: every part that could give other ids is held to what Llama 3 has."""

import json
from pathlib import Path

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.merges import reachable_merges
from megatron_llama3.tokenizer.vocabulary_files import SPLIT_PATTERN, byte_to_unicode, check_ranks

_SPLIT = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_ADDED_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False}
_NOTHING = (None, "", 0, False)
# The keys that must say nothing. What the post-processor adds is for the caller to ask for (`bos`, `eos`), and the decoder makes no ids.
_ABSENT = ("normalizer", "truncation", "padding")
_ABSENT_IN_MODEL = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def read_tokenizer_json(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """(ranks, special tokens) of a tokenizer.json of Llama 3's kind; any other kind, and a damaged file, is a UserError."""
    data = load_tokenizer_json(path)
    try:
        _check_parts(data, path)
        specials = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
        if any(type(id_) is not int for id_ in (*specials.values(), *data["model"]["vocab"].values())):
            raise TypeError("an id is no whole number")
        ranks = _ranks(data["model"]["vocab"], specials, path)
        _check_merges(data["model"], ranks, path)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer.json of Llama 3's kind: a part is missing or of another form ({error!r})") from None
    return ranks, specials


def load_tokenizer_json(path: Path) -> dict:
    """The JSON object in the file. Raises UserError."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a tokenizer.json: a JSON object is expected")
    return data


def vocabulary_entries(path: Path) -> int:
    """One more than the largest id that a tokenizer.json of any family gives. Raises UserError where it holds no vocabulary."""
    data = load_tokenizer_json(path)
    try:
        vocab = data["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # unigram models have a list of (token, score)
        return 1 + max([*map(int, ids), *(int(token["id"]) for token in data.get("added_tokens") or [])])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a tokenizer.json with a vocabulary") from None


def _check_parts(data: dict, path: Path) -> None:
    """Raises UserError for the first part that is not Llama 3's."""
    for part, keys in ((data, _ABSENT), (data["model"], _ABSENT_IN_MODEL)):
        for key in keys:
            if part.get(key) not in _NOTHING:
                raise UserError(f"{path}: not a Llama 3 tokenizer: its {key} is {str(part[key])[:60]}, Llama 3's has none")
    if data["model"].get("type") != "BPE":
        raise UserError(f"{path}: not a Llama 3 tokenizer: its model is of type {data['model'].get('type')}, Llama 3's is BPE")
    pre_tokenizer = data.get("pre_tokenizer") or {}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if len(steps) != 2 or not all(expected.items() <= step.items() for expected, step in zip((_SPLIT, _BYTE_LEVEL), steps)):
        names = ", ".join(str(step.get("type")) for step in steps)
        raise UserError(f"{path}: not a Llama 3 tokenizer: text must be cut by its pattern and become bytes, and by nothing else ({names})")
    for token in data["added_tokens"]:
        if not _ADDED_TOKEN.items() <= token.items():
            raise UserError(f"{path}: {token['content']} takes in what stands around it (lstrip, rstrip, single_word); Llama 3's do not")


def _ranks(vocab: dict[str, int], specials: dict[str, int], path: Path) -> dict[bytes, int]:
    to_byte = {char: byte for byte, char in byte_to_unicode().items()}
    try:
        ranks = {bytes(to_byte[char] for char in token): id_ for token, id_ in vocab.items() if token not in specials}
    except KeyError as error:
        raise UserError(f"{path}: character {error} is not in the byte-level alphabet") from None
    check_ranks(ranks, path)
    return ranks


def _check_merges(model: dict, ranks: dict[bytes, int], path: Path) -> None:
    """Raises UserError unless the merges say what the ranks say: each makes a token, in order of rank, and none is missing."""
    to_byte = {char: byte for byte, char in byte_to_unicode().items()}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(bytes(map(to_byte.__getitem__, left)), bytes(map(to_byte.__getitem__, right))) for left, right in pairs]
    order = [ranks.get(left + right, -1) for left, right in merges]
    needed = reachable_merges(ranks)
    whole_words = len(needed) == sum(len(token) > 1 for token in ranks) or model.get("ignore_merges") is True
    if -1 in order or order != sorted(order) or not set(needed) <= set(merges) or not whole_words:
        raise UserError(f"{path}: its merges are not those that the ids of its tokens imply: tiktoken, which encodes here, goes by the ids")
