"""Outliers by their words: Kullback-Leibler divergence of a document's word distribution from the corpus's (paper 3.1.1).

A short document diverges merely because it is short, so what is judged is the excess over a document of the same length whose
words are drawn from the corpus itself. Each language (the metadata entry `language`, where there is one) is its own corpus.
"""

import os

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_llama3.curation.global_block import GlobalBlock, Search
from megatron_llama3.curation.storage.files import task_file, whole_file
from megatron_llama3.curation.text.words import split_words, word_hashes

# Words are counted by hash: tables of one size, which add up to the same sums whatever the number of tasks.
BUCKETS = 1 << 20
_DRAWS = 8


class DivergenceFilter(GlobalBlock):
    """Drops documents (`divergent_words`) whose divergence exceeds that of a random text of their length by more than `max_excess` nats.

    min_words: shorter documents are not judged. The excess is left in `word_divergence`.
    """

    def __init__(self, max_excess: float = 2.5, min_words: int = 20):
        self.max_excess, self.min_words = max_excess, min_words

    def collect(self, folder: str, partitions: int) -> PipelineStep:
        return CountWords(folder)

    def search(self, folder: str, tasks: int) -> list[Search]:
        return [Search("words", 1, AddCounts(folder, os.path.join(folder, "corpus"), tasks))]

    def apply(self, folder: str) -> PipelineStep:
        return DropDivergent(os.path.join(folder, "corpus"), self.max_excess, self.min_words)


def word_buckets(text: str) -> np.ndarray:
    """int64 [words]"""
    return (word_hashes(split_words(text)) % np.uint64(BUCKETS)).astype(np.int64)


class CountWords(PipelineStep):
    """First pass: the words of each language; `RANK.npz`: languages, and uint64 [languages, BUCKETS]."""

    type = "STATS"
    name = "word counts"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        languages: dict[str, np.ndarray] = {}
        for doc in data:
            buckets, counts = np.unique(word_buckets(doc.text), return_counts=True)
            language = _language(doc)
            if language not in languages:
                languages[language] = np.zeros(BUCKETS, np.uint64)
            languages[language][buckets] += counts.astype(np.uint64)
            yield doc
        _save_counts(task_file(self.folder, rank, "npz"), languages)


class AddCounts(PipelineStep):
    """The sum over all tasks, once, so that the second pass reads one file."""

    type = "STATS"
    name = "word counts of the corpus"

    def __init__(self, folder: str, output: str, ranks: int):
        super().__init__()
        self.folder, self.output, self.ranks = folder, output, ranks

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        total: dict[str, np.ndarray] = {}
        for number in range(self.ranks):
            for language, counts in _load_counts(task_file(self.folder, number, "npz")).items():
                total[language] = total[language] + counts if language in total else counts
        _save_counts(task_file(self.output, 0, "npz"), total)


def _save_counts(path: str, languages: dict[str, np.ndarray]) -> None:
    names = np.array(list(languages) or [""])
    table = np.stack(list(languages.values())) if languages else np.zeros((1, BUCKETS), np.uint64)
    with whole_file(path) as file:
        np.savez_compressed(file, names=names, table=table)


def _load_counts(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(zip(file["names"].tolist(), file["table"]))


class DropDivergent(BaseFilter):
    """Second pass."""

    name = "divergence from the corpus"
    score = ("word_divergence", 0.25)

    def __init__(self, corpus: str, max_excess: float, min_words: int):
        super().__init__()
        self.corpus, self.max_excess, self.min_words = corpus, max_excess, min_words
        self.score_threshold = max_excess
        self._corpora: dict[str, WordDistribution] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._corpora is None:  # here, since the step is made before the first pass has run
            counts = _load_counts(task_file(self.corpus, 0, "npz"))
            self._corpora = {language: WordDistribution(table) for language, table in counts.items()}
        words = word_buckets(doc.text)
        if len(words) < self.min_words:
            return True
        excess = self._corpora[_language(doc)].excess(words)
        doc.metadata["word_divergence"] = round(excess, 3)
        return True if excess <= self.max_excess else (False, "divergent_words")


def _language(doc: Document) -> str:
    return str(doc.metadata.get("language", ""))


class WordDistribution:
    """A corpus's distribution; a word that it lacks counts as one occurrence of half a word. counts: [buckets]."""

    def __init__(self, counts: np.ndarray):
        total = max(float(counts.sum()), 1.0)
        self.surprise = np.log(total / np.maximum(counts.astype(np.float64), 0.5))
        shares = np.sort(counts[counts > 0].astype(np.float64))[::-1]
        self.shares = shares / total
        self.cumulative = np.cumsum(self.shares)
        self.cumulative[-1:] = 1.0
        self._drawn_divergence: dict[int, float] = {}

    def excess(self, words: np.ndarray) -> float:
        """Nats above the divergence of as many random words. words: their buckets, at least one."""
        buckets, counts = np.unique(words, return_counts=True)
        shares = counts / len(words)
        return float((shares * (self.surprise[buckets] + np.log(shares))).sum()) - self.expected(len(words))

    def expected(self, words: int) -> float:
        """Linear in log n between powers of two, each the mean of a few drawn texts."""
        power = float(np.clip(np.log2(words), 0, 16))
        low = int(power)
        return (1 - power + low) * self._drawn(low) + (power - low) * self._drawn(min(low + 1, 16))

    def _drawn(self, power: int) -> float:
        if power not in self._drawn_divergence:
            rng, divergences = np.random.default_rng(power), []
            for _ in range(max(_DRAWS, 2048 >> power)):
                drawn = np.searchsorted(self.cumulative, rng.random(2**power), side="right")
                words, counts = np.unique(drawn, return_counts=True)
                divergences.append(float((counts * np.log(counts / 2**power / self.shares[words])).sum()) / 2**power)
            self._drawn_divergence[power] = float(np.mean(divergences))
        return self._drawn_divergence[power]
