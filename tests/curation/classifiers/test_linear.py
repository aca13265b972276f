"""The linear classifier learns what single words do not tell, and its training is a function of its input."""

import numpy as np

from megatron_llama3.curation.classifiers.linear import LinearClassifier
from tests.curation.classifiers.models import examples, trained


def accuracy(model, texts, labels) -> float:
    rows = model.probabilities(texts)
    np.testing.assert_allclose(rows.sum(1), 1.0, rtol=1e-5)
    return float(np.mean([model.config.labels[row.argmax()] == label for row, label in zip(rows, labels)]))


def test_it_tells_texts_apart_that_it_has_not_seen():
    assert accuracy(trained(), *examples(40, 1)) > 0.9


def test_training_is_a_function_of_its_input():
    texts = examples(3, 2)[0]
    np.testing.assert_array_equal(trained().probabilities(texts), trained().probabilities(texts))


def test_classes_of_unequal_size_weigh_the_same():
    """Texts that say nothing: of 90 good and 10 bad ones, each class has half of the probability."""
    model = LinearClassifier.train_on(["the same text"] * 100, ["good"] * 90 + ["bad"] * 10, buckets=1 << 10)
    assert model.probabilities(["the same text"]).min() > 0.3  # 0.1 without weights
