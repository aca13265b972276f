"""Words of any language by one regular expression: what counting and comparing needs, without a linguistic splitter.

A run of letters and digits is a word; in scripts written without spaces every character is one.
"""

import zlib
from functools import lru_cache

import numpy as np
import regex
from datatrove.utils.word_tokenizers import WordTokenizer

_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_CHARACTER = rf"(?![{_WITHOUT_SPACES}])[\p{{L}}\p{{M}}\p{{N}}]"
_WORD = regex.compile(rf"[{_WITHOUT_SPACES}]|(?:{_CHARACTER})+(?:['’](?:{_CHARACTER})+)*")
_WORD_OR_SYMBOL = regex.compile(rf"{_WORD.pattern}|(?<!\S)[^\s\p{{L}}\p{{M}}\p{{N}}]+(?!\S)")
_UNSPACED = regex.compile(rf"[{_WITHOUT_SPACES}]")
_SENTENCE_END = regex.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


def split_words(text: str) -> list[str]:
    """Lower-cased words, punctuation dropped."""
    return _WORD.findall(text.lower())


def is_unspaced(word: str) -> bool:
    """Whether it is one character of a script without spaces."""
    return len(word) == 1 and word > "\u0e00" and _UNSPACED.match(word) is not None


@lru_cache(maxsize=1 << 18)
def word_hash(word: str) -> int:
    """32 bits that are the same in every process and on every machine."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def word_hashes(words: list[str]) -> np.ndarray:
    """uint64 [words]: `word_hash` of each, spread over 64 bits."""
    hashes = np.fromiter(map(word_hash, words), dtype=np.uint64, count=len(words))
    return mix(hashes)


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(0, len - n + 1)]: one hash an n-gram, from the hashes of its words."""
    count = max(0, len(hashes) - n + 1)
    combined = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        combined = mix(combined * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count])
    return combined


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class RegexWordTokenizer(WordTokenizer):
    """These words for datatrove's own filters, as their `language` argument: no spaCy, no download."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words with their case, and marks that stand alone between spaces (in Gopher's rules a word is what stands between spaces)."""
        return _WORD_OR_SYMBOL.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence for sentence in map(str.strip, _SENTENCE_END.split(text)) if sentence]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        spans, start = [], 0
        for sentence in self.sent_tokenize(text):
            start = text.index(sentence, start)
            spans.append((start, start + len(sentence)))
            start += len(sentence)
        return spans
