"""Texts as normalised words, and these as 64-bit hashes: datatrove's `simplify_text` at the speed of a dictionary."""

import re

import numpy as np
import xxhash
from datatrove.utils.text import simplify_text

# Scripts written without spaces between words: Thai, Lao, Burmese, Khmer, kana, CJK ideographs. Each character is a word.
_RANGES = "\\u0e01-\\u0eff\\u1000-\\u109f\\u1780-\\u17ff\\u3041-\\u30ff\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff\\U00020000-\\U0003ffff"
_UNSPACED = re.compile(f"([{_RANGES}])")
_MAX_KNOWN = 1 << 20
_MAX_KNOWN_LENGTH = 64  # longer ones are rarely seen twice


def normalised_words(text: str) -> list[str]:
    """Lower-case words without punctuation and accents, every number "0"."""
    if text.isascii() and text.isalpha():
        return [text.lower()]
    text = simplify_text(text)
    return (text if text.isascii() else _UNSPACED.sub(r" \1 ", text)).split()


class WordHashes(dict):
    """What lies between two spaces -> the hashes of its normalised words, 8 bytes each. Forgets everything when it has grown too large."""

    def __missing__(self, token: str) -> bytes:
        hashes = b"".join(xxhash.xxh3_64_digest(word) for word in normalised_words(token))
        if len(token) <= _MAX_KNOWN_LENGTH:
            if len(self) >= _MAX_KNOWN:
                self.clear()
            self[token] = hashes
        return hashes

    def of_text(self, text: str) -> bytes:
        return b"".join(map(self.__getitem__, text.split()))


def word_ngrams(texts: list[bytes], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all n-grams of words: uint64 [total], and where each text's begin: uint64 [texts + 1].

    texts: word hashes as bytes. A text of fewer than n words has one n-gram, all of it; a text of none has none.
    """
    texts = [text.ljust(8 * n, b"\0") if text else text for text in texts]
    words = np.frombuffer(b"".join(texts), np.uint64)
    lengths = np.array([len(text) // 8 for text in texts])
    windows = max(len(words) - n + 1, 0)
    hashes = np.zeros(windows, np.uint64)
    for offset in range(n):
        hashes ^= words[offset : offset + windows]
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    ends = np.cumsum(lengths)
    within = np.repeat(ends, lengths)[:windows] - np.arange(windows) >= n  # drops windows that reach into the next text
    counts = np.maximum(lengths - n + 1, 0)
    return hashes[within], np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
