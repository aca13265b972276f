"""Outliers by their words: Kullback-Leibler divergence of a document's word distribution from the corpus's (paper 3.1.1).

A short document diverges merely because it is short, so what is judged is the excess over a document of the same length whose
words are drawn from the corpus itself. Each language (the metadata entry `language`, where there is one) is its own corpus.
"""

from collections import Counter

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_llama3.curation.plain_words import split_words
from megatron_llama3.curation.steps import GlobalBlock, Search
from megatron_llama3.curation.task_counts import read_task_counts, write_task_counts

_MOST_WORDS = 1_000_000  # listed by a task for a language; rarer ones go in as one number
_DRAWS = 8


class DivergenceFilter(GlobalBlock):
    """Drops documents (`divergent_words`) whose divergence exceeds that of a random text of their length by more than `max_excess` nats.

    min_words: shorter documents are not judged. The excess is left in `word_divergence`.
    """

    def __init__(self, max_excess: float = 3.0, min_words: int = 20):
        self.max_excess, self.min_words = max_excess, min_words

    def collect(self, folder: str, partitions: int) -> PipelineStep:
        return CountWords(folder)

    def search(self, folder: str, tasks: int) -> list[Search]:
        return []

    def apply(self, folder: str) -> PipelineStep:
        return DropDivergent(folder, self.max_excess, self.min_words)


class CountWords(PipelineStep):
    """First pass: the words of each language."""

    type = "STATS"
    name = "word counts"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        languages: dict[str, Counter[str]] = {}
        for doc in data:
            languages.setdefault(_language(doc), Counter()).update(split_words(doc.text))
            yield doc
        written = {}
        for language, counts in languages.items():
            common = dict(counts.most_common(_MOST_WORDS))
            written[language] = {"words": common, "rare": counts.total() - sum(common.values())}
        write_task_counts(self.folder, rank, world_size, written)


class DropDivergent(BaseFilter):
    """Second pass."""

    name = "divergence from the corpus"

    def __init__(self, folder: str, max_excess: float, min_words: int):
        super().__init__()
        self.folder, self.max_excess, self.min_words = folder, max_excess, min_words
        self._corpora: dict[str, WordDistribution] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._corpora is None:  # here, since the step is made before the first pass has run
            self._corpora = read_corpora(self.folder)
        words = split_words(doc.text)
        if len(words) < self.min_words:
            return True
        excess = self._corpora[_language(doc)].excess(words)
        doc.metadata["word_divergence"] = round(excess, 3)
        return True if excess <= self.max_excess else (False, "divergent_words")


def _language(doc: Document) -> str:
    return str(doc.metadata.get("language", ""))


def read_corpora(folder: str) -> dict[str, "WordDistribution"]:
    """language -> its distribution, from the counts of all tasks."""
    words: dict[str, Counter[str]] = {}
    rare: Counter[str] = Counter()
    for task in read_task_counts(folder):
        for language, counts in task.items():
            words.setdefault(language, Counter()).update(counts["words"])
            rare[language] += counts["rare"]
    return {language: WordDistribution(counts, rare[language]) for language, counts in words.items()}


class WordDistribution:
    """A corpus's distribution; a word that it lacks counts as one occurrence of half a word."""

    def __init__(self, counts: Counter[str], rare: int = 0):
        total = counts.total() + rare
        self.unseen = float(np.log(2 * max(total, 1)))
        self.surprise = {word: float(-np.log(count / total)) for word, count in counts.items()}
        shares = np.array(sorted(counts.values(), reverse=True), dtype=np.float64)
        self.shares = shares / shares.sum()
        self.cumulative = np.cumsum(self.shares)
        self.cumulative[-1] = 1.0
        self._drawn_divergence: dict[int, float] = {}

    def excess(self, words: list[str]) -> float:
        """Nats above the divergence of as many random words. words: at least one."""
        counts = Counter(words)
        shares = np.array(list(counts.values())) / len(words)
        surprise = np.array([self.surprise.get(word, self.unseen) for word in counts])
        return float((shares * (surprise + np.log(shares))).sum()) - self.expected(len(words))

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
