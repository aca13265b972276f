"""A linear classifier over hashed words and word pairs, as fastText's supervised mode is without its hidden layer; numpy only.

A text is the set of its words and pairs of neighbours, each a bucket with weight sqrt(count), the whole of length 1. The model is one
weight a bucket and label, trained by Adagrad on the cross entropy.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megatron_llama3.curation.classifiers.model_file import save_classifier
from megatron_llama3.curation.text.words import ngram_hashes, split_words, word_hashes


@dataclass(frozen=True)
class LinearConfig:
    """labels: in the order of the columns. max_words: of a text so many are read, from its start."""

    labels: list[str]
    buckets: int = 1 << 18
    ngrams: int = 2
    max_words: int = 2_000


@dataclass
class LinearClassifier:
    """weight: float32 [buckets, labels]; bias: float32 [labels]."""

    config: LinearConfig
    weight: np.ndarray = field(repr=False)
    bias: np.ndarray = field(repr=False)

    @classmethod
    def train_on(
        cls, texts: Sequence[str], labels: Sequence[str], seed: int = 0, epochs: int = 8, lr: float = 0.5, **config
    ) -> "LinearClassifier":
        """Fits texts to their labels; classes of unequal size weigh the same. The same input gives the same bits."""
        names = sorted(set(labels))
        model = cls._empty(LinearConfig(names, **config))
        targets = np.array([names.index(label) for label in labels])
        class_weight = len(targets) / (len(names) * np.bincount(targets, minlength=len(names)))
        features = [model.features(text) for text in texts]
        squares, bias_squares = np.full_like(model.weight, 1e-8), np.full_like(model.bias, 1e-8)
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            for i in rng.permutation(len(features)):
                buckets, values = features[i]
                gradient = _softmax(values @ model.weight[buckets] + model.bias)
                gradient[targets[i]] -= 1.0
                gradient *= class_weight[targets[i]]
                step = values[:, None] * gradient
                squares[buckets] += step**2
                model.weight[buckets] -= lr * step / np.sqrt(squares[buckets])
                bias_squares += gradient**2
                model.bias -= lr * gradient / np.sqrt(bias_squares)
        return model

    @classmethod
    def _empty(cls, config: LinearConfig) -> "LinearClassifier":
        columns = len(config.labels)
        return cls(config, np.zeros((config.buckets, columns), dtype=np.float32), np.zeros(columns, dtype=np.float32))

    def features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Buckets int64 [k] without repetition, and their weights float32 [k], of length 1."""
        words = word_hashes(split_words(text)[: self.config.max_words])
        grams = np.concatenate([ngram_hashes(words, n) for n in range(1, self.config.ngrams + 1)])
        buckets, counts = np.unique((grams % np.uint64(self.config.buckets)).astype(np.int64), return_counts=True)
        values = np.sqrt(counts).astype(np.float32)
        return buckets, values / max(1.0, float(np.linalg.norm(values)))

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float [texts, labels]; rows sum to 1."""
        rows = []
        for text in texts:
            buckets, values = self.features(text)
            rows.append(_softmax(values @ self.weight[buckets] + self.bias))
        return np.array(rows).reshape(len(texts), len(self.config.labels))

    def save(self, path: str | Path) -> None:
        save_classifier(path, "linear", asdict(self.config), {"weight": self.weight, "bias": self.bias})

    @classmethod
    def from_arrays(cls, config: dict, arrays: dict[str, np.ndarray]) -> "LinearClassifier":
        """Raises ValueError where shapes do not fit."""
        expected = cls._empty(LinearConfig(**config))
        if arrays["weight"].shape != expected.weight.shape or arrays["bias"].shape != expected.bias.shape:
            raise ValueError(f"weight {arrays['weight'].shape}, expected {expected.weight.shape}")
        return cls(expected.config, arrays["weight"], arrays["bias"])


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()
