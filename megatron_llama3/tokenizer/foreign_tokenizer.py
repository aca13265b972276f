"""A tokenizer.json of any family, through Hugging Face's own library, beside Llama 3's tokenizer (`llama3.py`).

`open_tokenizer` gives whichever a file needs; both are an AnyTokenizer.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.llama3 import load_tokenizer
from megatron_llama3.tokenizer.tokenizer_json import load_tokenizer_json, vocabulary_entries
from megatron_llama3.tokenizer.vocabulary_files import tokenizer_file

_CONFIG = "tokenizer_config.json"


class AnyTokenizer(Protocol):
    """What generating text needs."""

    vocab_size: int
    """one more than the largest id"""
    stop_ids: tuple[int, ...]

    def encode(self, text: str, bos: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ForeignTokenizer:
    """Raises UserError for a file that the library refuses. `tokenizer_config.json` beside it names the token that ends a text."""

    def __init__(self, path: Path):
        self.path, self.vocab_size = path, vocabulary_entries(path)
        self._library = _open(path)
        # A special token spelled in a text is plain text: what a user types must not become control.
        self._library.encode_special_tokens = True
        self.stop_ids = self._stop_ids()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, with `bos` behind those that the file puts before every text (none in some families)."""
        ids = self._library.encode(text, add_special_tokens=False).ids
        return [*self._before, *ids] if bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out. Raises KeyError on an unknown id."""
        unknown = [id_ for id_ in map(int, ids) if self._library.id_to_token(id_) is None]
        if unknown:
            raise KeyError(unknown[0])
        return self._library.decode(list(map(int, ids)), skip_special_tokens=False)

    @functools.cached_property
    def _before(self) -> list[int]:
        plain = self._library.encode("a", add_special_tokens=False).ids
        framed = self._library.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        return framed[: next(starts, 0)]

    def _stop_ids(self) -> tuple[int, ...]:
        config = self.path.with_name(_CONFIG)
        end = load_tokenizer_json(config).get("eos_token") if config.is_file() else None
        end = end.get("content") if isinstance(end, dict) else end  # older files spell a token out
        if end is None:
            return ()
        id_ = self._library.token_to_id(end) if isinstance(end, str) else None
        if id_ is None:
            raise UserError(f"{config}: eos_token {str(end)[:60]!r} is no token of {self.path.name}")
        return (id_,)


def open_tokenizer(path: str | Path) -> AnyTokenizer:
    """Llama 3's tokenizer where the file is of its kind, else what a tokenizer.json of another family says.

    Raises UserError for a missing or damaged file, and for a tokenizer.model that is not Llama 3's.
    """
    file = tokenizer_file(path)
    if file.suffix != ".json":
        return load_tokenizer(file)
    try:
        return load_tokenizer(file)
    except UserError:
        return ForeignTokenizer(file)


def _open(path: Path):
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{path}: not Llama 3's tokenizer, and for another `tokenizers` is not installed: pip install tokenizers") from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panics are no Exceptions
        raise UserError(f"{path}: the tokenizers library refuses it: {' '.join(str(error).split())[:200]}") from None
