"""Llama 3's tokenizer: byte-level BPE ranks, then 256 special tokens. Paper section 3.2; identical to Meta's `Tokenizer` in llama-models.

tokenizer = load_tokenizer("tokenizer.model")      # or a tokenizer.json, or a folder holding either
ids = tokenizer.encode("Hello", bos=True)
"""

import functools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.tokenizer_json import read_tokenizer_json, vocabulary_entries
from megatron_llama3.tokenizer.vocabulary_files import (
    SPLIT_PATTERN,
    huggingface_json,
    read_tiktoken,
    tokenizer_file,
    write_tiktoken,
    write_whole,
)

if TYPE_CHECKING:
    import tiktoken

_NAMED = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)
NUM_SPECIAL_TOKENS = 256
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in (*_NAMED, *(f"reserved_special_token_{i}" for i in range(2, 246))))

# Meta's guards: tiktoken panics on very long input, and its time grows with the square of an unbroken run.
MAX_ENCODE_CHARS = 400_000
MAX_RUN_CHARS = 25_000
_RUNS, _SPACE, _NO_SPACE = (re.compile(pattern) for pattern in (r"\s+|\S+", r"\s", r"\S"))


class Tokenizer:
    """Text to ids and back. `ranks` are the BPE tokens (bytes to id 0..n_bpe-1); special tokens take the next 256 ids.

    `special_tokens` maps names to ids. A file from Hugging Face may name reserved tokens differently; the roles
    (bos_id, eos_id, pad_id, eot_id, ...) follow the position after the ranks, which all published files share.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int] | None = None):
        self.ranks = ranks
        self.n_bpe = len(ranks)
        self.special_tokens = special_tokens or {name: self.n_bpe + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = self.n_bpe + NUM_SPECIAL_TOKENS
        ids = {name: self.n_bpe + SPECIAL_TOKENS.index(f"<|{name}|>") for name in _NAMED}
        self.bos_id = ids["begin_of_text"]
        self.eos_id = ids["end_of_text"]
        self.pad_id = ids["finetune_right_pad_id"]
        self.start_header_id = ids["start_header_id"]
        self.end_header_id = ids["end_header_id"]
        self.eom_id = ids["eom_id"]
        self.eot_id = ids["eot_id"]
        self.python_tag_id = ids["python_tag"]
        self.image_id = ids["image"]
        self.stop_ids = (self.eos_id, self.eom_id, self.eot_id)

    @functools.cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """The tiktoken encoder, built on first use: bulk tokenisation never needs it."""
        import tiktoken

        return tiktoken.Encoding(name="llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_tokens)

    def encode(self, text: str, bos: bool = False, eos: bool = False, allowed_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """Ids of `text`. The spelling of a special token is plain text unless its name is in `allowed_special`."""
        allowed = "all" if allowed_special == "all" else set(allowed_special)
        ids = [self.bos_id] if bos else []
        for piece in split_for_encoding(text):
            ids.extend(self.encoding.encode(piece, allowed_special=allowed, disallowed_special=()))
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD. Raises KeyError on an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self.token_bytes.__getitem__, map(int, ids)))

    @functools.cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """The bytes of every id, special tokens included."""
        specials = {id_: name.encode() for name, id_ in self.special_tokens.items()}
        return {id_: token for token, id_ in self.ranks.items()} | specials

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Writes `tokenizer.model` (tiktoken form), `tokenizer.json` and `tokenizer_config.json` (Hugging Face form)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tiktoken(folder / "tokenizer.model", self.ranks)
        self.save_huggingface(folder, chat_template)

    def save_huggingface(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Writes what `AutoTokenizer.from_pretrained(folder)` reads: identical ids, with BOS prepended as in the published files."""
        name_of = {id_: name for name, id_ in self.special_tokens.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name_of[self.bos_id],
            "eos_token": name_of[self.eos_id],
            "pad_token": name_of[self.pad_id],
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if chat_template:
            config["chat_template"] = chat_template
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = huggingface_json(self.ranks, self.special_tokens, bos=name_of[self.bos_id])
        write_whole(folder / "tokenizer.json", text.encode())
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """From Meta's `tokenizer.model`, a Hugging Face `tokenizer.json`, or a folder holding one of them.

    Raises UserError for a missing or foreign file.
    """
    path = tokenizer_file(path)
    if path.suffix != ".json":
        return Tokenizer(read_tiktoken(path))
    ranks, specials = read_tokenizer_json(path)
    _check_specials(path, len(ranks), specials)
    return Tokenizer(ranks, specials)


class TooManyEntriesError(UserError):
    """A tokenizer of `entries` ids beside a model of fewer."""

    def __init__(self, path: str | Path, entries: int, vocab_size: int):
        super().__init__(f"--tokenizer-model {path} has {entries} entries, --vocab-size {vocab_size} is smaller: raise it, or name another")
        self.entries = entries


def check_vocabulary_size(path: str | Path, vocab_size: int) -> None:
    """Raises UserError where a tokenizer, of Llama 3's kind or any that a tokenizer.json holds, has ids that a model lacks."""
    file = tokenizer_file(path)
    try:
        entries = vocabulary_entries(file) if file.suffix == ".json" else len(read_tiktoken(file)) + NUM_SPECIAL_TOKENS
    except UserError as error:
        raise UserError(f"--tokenizer-model {error}") from None
    if entries > vocab_size:
        raise TooManyEntriesError(path, entries, vocab_size)


def _check_specials(path: Path, n_bpe: int, specials: dict[str, int]) -> None:
    if sorted(specials.values()) != list(range(n_bpe, n_bpe + NUM_SPECIAL_TOKENS)):
        raise UserError(f"{path}: {len(specials)} special tokens; Llama 3 has 256, ids {n_bpe}..{n_bpe + 255} after the BPE ranks")
    for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"):
        expected = n_bpe + _NAMED.index(name)
        if specials.get(f"<|{name}|>") != expected:
            raise UserError(f"{path}: <|{name}|> has id {specials.get(f'<|{name}|>')}, Llama 3 gives it {expected}")


def split_for_encoding(text: str) -> Iterator[str]:
    """Cuts `text` as Meta's Tokenizer does: at every 400,000 characters, and runs of (non-)whitespace at 25,000."""
    for start in range(0, len(text), MAX_ENCODE_CHARS):
        piece = text[start : start + MAX_ENCODE_CHARS]
        if len(piece) <= MAX_RUN_CHARS or not _may_have_long_run(piece):
            yield piece
        else:
            yield from _split_long_runs(piece)


def _may_have_long_run(piece: str) -> bool:
    """False only if no run exceeds the limit: such a run would fill one of these blocks, of half its length, from end to end."""
    block = MAX_RUN_CHARS // 2
    starts = range(0, len(piece) - block + 1, block)
    return not all(_SPACE.search(piece, start, start + block) and _NO_SPACE.search(piece, start, start + block) for start in starts)


def _split_long_runs(piece: str) -> Iterator[str]:
    begin = 0
    for run in _RUNS.finditer(piece):
        for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
            yield piece[begin:cut]
            begin = cut
    yield piece[begin:]
