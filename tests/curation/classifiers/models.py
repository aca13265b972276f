"""Small classifiers to train, and texts to train them on."""

import json
from random import Random

import numpy as np

from megatron_llama3.curation.classifiers.linear import LinearClassifier
from tests.curation import planted


def examples(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Prose, and the same kind of prose with its words in random order: alike in single words, not in their pairs."""
    rng = Random(seed)
    texts, labels = [], []
    for _ in range(count):
        words = planted.prose(rng, 4).split()
        texts.append(" ".join(words))
        labels.append("good")
        rng.shuffle(words)
        texts.append(" ".join(words))
        labels.append("bad")
    return texts, labels


def trained() -> LinearClassifier:
    return LinearClassifier.train_on(*examples(60, 0), buckets=1 << 14)


def change_description(path, **changes):
    """Other values in the description of a saved model."""
    with np.load(path) as file:
        arrays = dict(file)
    description = {**json.loads(arrays["description"].tobytes()), **changes}
    arrays["description"] = np.frombuffer(json.dumps(description).encode(), dtype=np.uint8)
    np.savez(path, **arrays)
