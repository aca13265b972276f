"""Bulk tokenisation: gigatoken where it equals the reference, the reference where it does not. ids always equal `Tokenizer.encode`."""

import re
from collections.abc import Callable

import numpy as np

from megatron_llama3.tokenizer.bulk_encoder import load_encoder
from megatron_llama3.tokenizer.llama3 import MAX_ENCODE_CHARS, MAX_RUN_CHARS, Tokenizer, split_for_encoding

# Letters and digits that Unicode 17 added: gigatoken 0.10 knows them, tiktoken's and transformers' tables do not yet.
# Found by comparing the two on every code point, which tests/data/test_preprocess_tokenize.py does again.
_DISPUTED = (
    "\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7\U00011db0-\U00011ddb\U00011de0-\U00011de9"
    "\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e\U00018d80-\U00018df2"
    "\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2\U0001e6e4\U0001e6e5\U0001e6e7-\U0001e6ed\U0001e6f0-\U0001e6f4\U0001e6fe\U0001e6ff"
    "\U0002b73a-\U0002b73f\U0002cea2-\U0002cead\U000323b0-\U00033479"
)
_disputed = re.compile(f"[{_DISPUTED}]").search
# Their first bytes in UTF-8: finding none of these is many times faster than that search.
_DISPUTED_OF_4_BYTES = re.compile(rb"\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]").search
_DISPUTED_OF_3_BYTES = (b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c")


class BulkTokenizer:
    """The fast path of a `Tokenizer`. Loading it takes most of a tool's start; fork workers after that.

    path: the file or folder that `tokenizer` came from, by which its encoder is found in the cache.
    """

    def __init__(self, tokenizer: Tokenizer, parse_special: bool = False, path: str | None = None):
        self.tokenizer = tokenizer
        self._parse_special = parse_special
        self._encode = load_encoder(tokenizer, path).encode

    def encode(self, text: str) -> np.ndarray:
        """ids of `text`, uint32 [n], without BOS and EOS."""
        if self._parse_special and "<|" in text:
            return np.array(self.tokenizer.encode(text, allowed_special="all"), dtype=np.uint32)
        if len(text) <= MAX_RUN_CHARS:
            return self._encode_piece(text)
        pieces = [self._encode_piece(piece) for piece in split_for_encoding(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _encode_piece(self, piece: str) -> np.ndarray:
        if piece.isascii():
            return self._encode(piece)
        utf8 = piece.encode()
        if _is_disputed(piece, utf8):
            return np.array(self.tokenizer.encode(piece), dtype=np.uint32)
        return self._encode(utf8)


def _is_disputed(piece: str, utf8: bytes) -> bool:
    # Looking for one byte is so fast that it pays to do it before looking for three.
    possible = (
        (b"\xf0" in utf8 and _DISPUTED_OF_4_BYTES(utf8))
        or (b"\xea" in utf8 and b"\xea\x9f" in utf8)
        or (b"\xe0" in utf8 and any(mark in utf8 for mark in _DISPUTED_OF_3_BYTES))
    )
    return bool(possible) and _disputed(piece) is not None


class PartEncoder:
    """Encodes a text that comes in parts and is never whole in memory. The ids that `sink` receives equal those of the whole."""

    def __init__(self, tokenizer: BulkTokenizer, sink: Callable[[np.ndarray], None]):
        self._tokenizer, self._sink = tokenizer, sink
        self._held: list[str] = []
        self._length = 0
        self.characters = 0

    def add(self, part: str) -> None:
        self._held.append(part)
        self._length += len(part)
        self.characters += len(part)
        if self._length >= MAX_ENCODE_CHARS:
            self._flush(self._length - self._length % MAX_ENCODE_CHARS)

    def finish(self) -> None:
        self._flush(self._length)

    def _flush(self, end: int) -> None:
        """Encodes the first `end` held characters, cut where `Tokenizer.encode` would cut the whole."""
        text = "".join(self._held)
        for start in range(0, end, MAX_ENCODE_CHARS):
            self._sink(self._tokenizer.encode(text[start : min(start + MAX_ENCODE_CHARS, end)]))
        self._held, self._length = [text[end:]], len(text) - end
