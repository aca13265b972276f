"""Vocabularies for tests: Meta's real one where llama-models is installed, and a small one trained in a moment."""

import functools
import importlib.util
from pathlib import Path

import pytest
from hypothesis import strategies as st

from megatron_llama3.tokenizer.llama3 import Tokenizer, load_tokenizer
from megatron_llama3.tokenizer.train import train
from tests.tokenizer.texts import ALL


def meta_model_path() -> Path:
    """The real tokenizer.model, which the wheel of llama-models ships."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        pytest.skip("llama-models is not installed")
    return Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"


@functools.cache
def meta_vocabulary() -> Tokenizer:
    return load_tokenizer(meta_model_path())


@functools.cache
def small_vocabulary() -> Tokenizer:
    return train([*ALL.values()] * 3, 1024)


# Any text, and texts rich in what the split pattern treats specially.
_BLANKS = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\x00", "\u200b", "\ufeff"]
_WORDS = ["a", "Z", "'s", "'LL", "ſ", "1", "123", "٣", "é", "e\u0301", "日本", "👍🏽", "--", "<|eot_id|>", "İ", "Ⅷ", "𝒳", "x" * 20, "0" * 7]
_PIECES = st.sampled_from(_BLANKS + _WORDS)
TEXTS = st.one_of(st.text(max_size=80), st.lists(st.one_of(_PIECES, st.characters(exclude_categories=["Cs"])), max_size=30).map("".join))
