"""The byte-level BPE tokenizer that a GGUF file holds, as Hugging Face's tokenizer.json and tokenizer_config.json."""

import json

from megatron_llama3.tokenizer.vocabulary_files import SPLIT_PATTERN

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
# How text is cut before merging, by llama.cpp's name for it.
_PRE_TOKENIZERS = {
    "llama-bpe": {"type": "Sequence", "pretokenizers": [_SPLIT, _BYTE_LEVEL]},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}],
    },
    "gpt-2": _BYTE_LEVEL | {"use_regex": True},
}
_CONTROL, _USER_DEFINED = 3, 4  # token types


def tokenizer_from_gguf(fields: dict) -> tuple[dict[str, bytes], dict]:
    """(files by name, token ids for the generation config). No files where the tokenizer is of a kind that is not translated."""
    ids = {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    generation = {key: value for key, value in ids.items() if value is not None}
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _PRE_TOKENIZERS:
        return {}, generation
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id_, "content": token, **flags, "special": type_ == _CONTROL}
        for id_, (token, type_) in enumerate(zip(tokens, types))
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": cut == "llama-bpe", "vocab": {token: id_ for id_, token in enumerate(tokens)},
        "merges": fields["tokenizer.ggml.merges"],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[cut], "post_processor": _post_processor(fields, tokens),
        "decoder": _BYTE_LEVEL | {"use_regex": True}, "model": model,
    }  # fmt: skip
    names = {key.removesuffix("_id"): tokens[id_] for key, id_ in generation.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}, generation


def _post_processor(fields: dict, tokens: list[str]) -> dict:
    """Whether encoding begins with the begin-of-text token; llama.cpp's default for Llama 3 is yes."""
    by_default = fields["tokenizer.ggml.pre"] == "llama-bpe"
    if not fields.get("tokenizer.ggml.add_bos_token", by_default):
        return _BYTE_LEVEL
    id_ = fields["tokenizer.ggml.bos_token_id"]
    bos = tokens[id_]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing", "single": [start, first], "pair": [start, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [id_], "tokens": [bos]}},
    }  # fmt: skip
