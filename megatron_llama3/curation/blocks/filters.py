"""Heuristic filters (paper 3.1.1): repeated n-grams and dirty words; beside them datatrove's Gopher, C4 and FineWeb filters with our words.

datatrove's filters split words with spaCy unless told otherwise; here they get `RegexWordTokenizer`, and need neither spaCy nor models.
"""

import re

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.storage.list_file import read_lists
from megatron_llama3.curation.text.words import RegexWordTokenizer, is_unspaced, ngram_hashes, split_words, word_hashes

# Twice Gopher's limits (Rae et al. 2021, Table A1): with its own, 11% of 300 of Debian's manual pages would go.
NGRAM_LIMITS = ((5, 0.30), (6, 0.28), (7, 0.26), (8, 0.24), (9, 0.22), (10, 0.20))
_CHARACTERS_A_WORD = 2  # in Japanese and Chinese: with 1, 42 of 147 Japanese manual pages would go
_DIGITS = re.compile(r"\d+|\b0x[0-9a-fA-F]+\b")


class DuplicateNgramFilter(BaseFilter):
    """Drops repetitive lines, then documents that repeat themselves (`duplicate_ngrams`) or of which too little is left (`repeated_lines`).

    Numbers count as equal here, so that a log is what it is in spite of its time stamps: the paper's case, lines too unique for
    deduplication by line. A line of at least `min_line_words` words goes where more than `line_coverage` of its words lie in
    `line_ngram`-grams that the document has at least `line_repeats` times.

    ngrams: (n, highest share of the characters of words that lie in an n-gram occurring more than once), as Gopher counts them: of an
    n-gram's occurrences the first is free, and none counts twice. Where most words are characters of a script without spaces, n is twice
    that. min_kept: the share of a document's words that must survive the removal of lines.
    """

    name = "Duplicate n-grams"

    def __init__(
        self,
        ngrams: list[tuple[int, float]] = NGRAM_LIMITS,
        line_ngram: int = 6,
        line_repeats: int = 8,
        line_coverage: float = 0.8,
        min_line_words: int = 10,
        min_kept: float = 0.5,
        exclusion_writer: DiskWriter | None = None,
    ):
        super().__init__(exclusion_writer)
        if min(line_ngram, line_repeats, min_line_words, *(n for n, _ in ngrams)) < 1:
            numbers = f"line_ngram {line_ngram}, line_repeats {line_repeats}, min_line_words {min_line_words}"
            raise UserError(f"ngrams {ngrams}, {numbers}: each must be at least 1")
        self.ngrams = [(int(n), float(limit)) for n, limit in ngrams]
        self.line_ngram, self.line_repeats, self.line_coverage = line_ngram, line_repeats, line_coverage
        self.min_line_words, self.min_kept = min_line_words, min_kept

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        lines = doc.text.split("\n")
        words = [split_words(_DIGITS.sub("0", line)) for line in lines]
        removed = self._repetitive(words)
        if removed.any():
            total = sum(map(len, words))
            kept = [number for number in range(len(lines)) if not removed[number]]
            if sum(len(words[number]) for number in kept) < self.min_kept * total:
                return False, "repeated_lines"
            self.stat_update("lines_removed", value=len(lines) - len(kept), unit="doc")
            doc.text = "\n".join(lines[number] for number in kept)
            words = [words[number] for number in kept]
        flat = [word for line in words for word in line]
        scale = _CHARACTERS_A_WORD if sum(map(is_unspaced, flat)) > len(flat) / 2 else 1
        shares = duplicate_coverage(flat, [scale * n for n, _ in self.ngrams])
        if any(shares[scale * n] > limit for n, limit in self.ngrams):
            return False, "duplicate_ngrams"
        return True

    def _repetitive(self, words: list[list[str]]) -> np.ndarray:
        """bool [lines]: the lines whose words are nearly all in n-grams that come again and again."""
        lengths = np.array([len(line) for line in words])
        flat = word_hashes([word for line in words for word in line])
        covered = covered_words(flat, self.line_ngram, self.line_repeats)
        sums = np.concatenate([[0], np.cumsum(covered)])
        ends = np.cumsum(lengths)
        in_line = sums[ends] - sums[ends - lengths]
        return (lengths >= self.min_line_words) & (in_line > self.line_coverage * lengths)


def covered_words(hashes: np.ndarray, n: int, repeats: int) -> np.ndarray:
    """bool [words]: the words that lie in an n-gram which occurs at least `repeats` times."""
    grams = ngram_hashes(hashes, n)
    if not len(grams):
        return np.zeros(len(hashes), dtype=bool)
    _, inverse, counts = np.unique(grams, return_inverse=True, return_counts=True)
    starts = np.flatnonzero(counts[inverse] >= repeats)
    steps = np.zeros(len(hashes) + 1, dtype=np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + n, -1)
    return np.cumsum(steps[:-1]) > 0


def duplicate_coverage(words: list[str], sizes: list[int]) -> dict[int, float]:
    """For each n: the share of the words' characters in repetitions of an earlier n-gram."""
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    total = max(1, int(lengths.sum()))
    hashes = word_hashes(words)
    shares = {}
    for n in sizes:
        grams = ngram_hashes(hashes, n)
        _, first = np.unique(grams, return_index=True)
        repeated = np.ones(len(grams), dtype=bool)
        repeated[first] = False
        steps = np.zeros(len(words) + 1, dtype=np.int64)
        np.add.at(steps, np.flatnonzero(repeated), 1)
        np.add.at(steps, np.flatnonzero(repeated) + n, -1)
        shares[n] = float(lengths[np.cumsum(steps[:-1]) > 0].sum()) / total
    return shares


class DirtyWordFilter(BaseFilter):
    """Drops documents (`dirty_words`) with more than `max_words` words of the list and more than `max_share` of all words in it.

    words: files, one word or phrase a line; none comes with the project (a usual one is LDNOOBW's, which C4 used). Entries in scripts
    without spaces are found inside of runs of characters, all others as whole words. The count is left in `dirty_words`.
    """

    name = "Dirty words"

    def __init__(self, words: list[str] | str, max_words: int = 2, max_share: float = 0.002, exclusion_writer: DiskWriter | None = None):
        super().__init__(exclusion_writer)
        self.max_words, self.max_share = max_words, max_share
        phrases: dict[str, set[tuple[str, ...]]] = {}
        for entry in read_lists(words, "words"):
            if parts := tuple(split_words(entry)):
                phrases.setdefault(parts[0], set()).add(parts)
        self.phrases = phrases

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        words = split_words(doc.text)
        found = 0
        for start, word in enumerate(words):
            if word in self.phrases:
                found += any(tuple(words[start : start + len(phrase)]) == phrase for phrase in self.phrases[word])
        doc.metadata["dirty_words"] = found
        if found > self.max_words and found > self.max_share * len(words):
            return False, "dirty_words"
        return True


class _PlainlySplit:
    """Whatever `language` a filter of datatrove's is given, it splits words as this project does."""

    fixed_arguments = ("language",)
    language = property(lambda self: _WORD_TOKENIZER, lambda self, language: None)


_WORD_TOKENIZER = RegexWordTokenizer()


class GopherQuality(_PlainlySplit, GopherQualityFilter):
    """datatrove's filter by Gopher's rules for quality (Rae et al. 2021).

    Drops documents of too few or too many words (`gopher_short_doc`, `gopher_long_doc`), of too short or long ones
    (`gopher_below_avg_threshold`, `gopher_above_avg_threshold`), with too many `#` or ellipses for their words (`gopher_too_many_hashes`,
    `gopher_too_many_ellipsis`), lines that are bullets or end in an ellipsis (`gopher_too_many_bullets`, `gopher_too_many_end_ellipsis`),
    too few words with a letter (`gopher_below_alpha_threshold`), or too few English stop words (`gopher_enough_stop_words`).
    """

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return super().filter(doc) if split_words(doc.text) else (False, "gopher_short_doc")


class GopherRepetition(_PlainlySplit, GopherRepetitionFilter):
    """datatrove's filter by Gopher's rules for repetition.

    Drops documents with too many equal paragraphs or lines (`dup_para_frac`, `dup_para_char_frac`, `dup_line_frac`, `dup_line_char_frac`),
    too much of their text in one n-gram (`top_2_gram`, ...) or in repeated ones (`duplicated_5_n_grams`, ...), or no text (`empty`).
    """


class C4Quality(_PlainlySplit, C4QualityFilter):
    """datatrove's filter by C4's rules (Raffel et al. 2020), line by line, then by document.

    Takes out lines without a final mark, of too few words, with a word that is too long, on JavaScript, cookies and terms of use. Drops
    documents with `lorem_ipsum`, a `curly_bracket` (all code has one: `filter_curly_bracket: false` keeps it) or `too_few_sentences`.
    Final marks are `.`, `?`, `!` and quotes: Japanese and Chinese have none of them (`filter_no_terminal_punct: false`).
    """


class FineWebQuality(_PlainlySplit, FineWebQualityFilter):
    """datatrove's filter by FineWeb's rules (Penedo et al. 2024).

    Drops documents with too few lines that end in a mark (`line_punct_ratio`), too many short ones (`short_line_ratio`), too many
    characters in repeated lines (`char_dup_ratio`), too many line breaks for their words (`list_ratio`), or no text (`empty`).
    """

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return super().filter(doc) if split_words(doc.text) else (False, "empty")
