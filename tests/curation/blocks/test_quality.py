"""Classifiers: they learn, they are saved whole and refused where they do not fit, the filter scores and drops, judges' files are read."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import zstandard

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.quality import QualityFilter, ranking_quality, read_judgements, read_labels
from megatron_llama3.curation.classifiers.encoder import EncoderClassifier
from megatron_llama3.curation.classifiers.linear import LinearClassifier
from megatron_llama3.curation.classifiers.model_file import load_classifier, save_classifier
from tests.curation import planted
from tests.curation.steps import document, judge

TOOL = Path(__file__).parents[3] / "tools" / "train_quality.py"
SMALL_ENCODER = {"buckets": 2048, "width": 32, "layers": 1, "heads": 2, "max_words": 64}


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


def trained(kind: str):
    if kind == "linear":
        return LinearClassifier.train_on(*examples(60, 0), buckets=1 << 14)
    return EncoderClassifier.train_on(*examples(60, 0), epochs=8, lr=3e-3, **SMALL_ENCODER)


@pytest.fixture(scope="module", params=["linear", "encoder"])
def model(request):
    return trained(request.param)


def right(model, texts, labels) -> float:
    rows = model.probabilities(texts)
    np.testing.assert_allclose(rows.sum(1), 1.0, rtol=1e-5)
    return float(np.mean([model.config.labels[row.argmax()] == label for row, label in zip(rows, labels)]))


def test_it_tells_texts_apart_that_it_has_not_seen(model):
    assert right(model, *examples(40, 1)) > 0.9


def test_saved_and_loaded_it_gives_the_same_numbers(model, tmp_path):
    model.save(tmp_path / "new" / "model.npz")
    texts = [*examples(3, 2)[0], ""]
    np.testing.assert_array_equal(load_classifier(tmp_path / "new" / "model.npz").probabilities(texts), model.probabilities(texts))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.npz"]
    assert model.probabilities([]).shape == (0, 2)


def test_training_is_a_function_of_its_input(model):
    texts = examples(3, 2)[0]
    again = trained("linear" if isinstance(model, LinearClassifier) else "encoder")
    np.testing.assert_array_equal(again.probabilities(texts), model.probabilities(texts))


def test_the_filter_scores_every_document_and_drops_the_bad(model, tmp_path):
    model.save(tmp_path / "model.npz")
    texts, labels = examples(20, 3)
    step = QualityFilter(str(tmp_path / "model.npz"), batch_size=7)
    documents = [document(text, str(i)) for i, text in enumerate(texts)]
    kept = {doc.id for doc in step.run(iter(documents))}
    assert all(0 <= doc.metadata["quality_score"] <= 1 for doc in documents)
    assert all((doc.metadata["quality_score"] >= 0.5) == (doc.id in kept) for doc in documents)
    assert np.mean([(doc.id in kept) == (label == "good") for doc, label in zip(documents, labels)]) > 0.9
    assert judge(QualityFilter(str(tmp_path / "model.npz"), min_score=1.01), texts[0])[0] == "low_quality"
    with pytest.raises(UserError, match=r"label excellent: .*knows bad, good"):
        QualityFilter(str(tmp_path / "model.npz"), label="excellent").filter(document("text"))


def _changed(path, **changes):
    with np.load(path) as file:
        arrays = dict(file)
    description = {**json.loads(arrays["description"].tobytes()), **changes}
    arrays["description"] = np.frombuffer(json.dumps(description).encode(), dtype=np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": 0}, "version 0 of the features, this is 1"),
        ({"sha256": "0"}, "do not match their checksum"),
        ({"kind": "forest"}, "is of kind 'forest'"),
        ({"config": {"labels": ["a", "b", "c"]}}, "do not fit its configuration"),
        ({"config": {"colour": "red"}}, "do not fit its configuration"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model, tmp_path, changes, message):
    path = tmp_path / "model.npz"
    model.save(path)
    _changed(path, **changes)
    with pytest.raises(UserError, match=f"model .*model.npz: .*{message}"):
        load_classifier(path)


def test_no_model_and_half_a_model_are_refused(model, tmp_path):
    path = tmp_path / "model.npz"
    with pytest.raises(UserError, match="is no classifier"):
        load_classifier(path)
    model.save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="is no classifier"):
        load_classifier(path)


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    save_classifier(path, "linear", {}, {"a": np.ones(3)})
    before = path.read_bytes()

    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="No space"):
        save_classifier(path, "linear", {}, {"a": np.zeros(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["model.npz"]
    assert path.read_bytes() == before


def test_area_under_the_curve():
    assert ranking_quality([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert ranking_quality([0.5, 0.5], [True, False]) == 0.5


def _write(path, records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return str(path)


def test_judgements_have_texts_or_ids(tmp_path):
    documents = _write(tmp_path / "documents.jsonl", [{"id": "a", "text": "A text"}])
    judged = _write(tmp_path / "judged.jsonl", [{"id": "a", "score": 4}, {"text": "Another", "score": "1.5"}])
    assert read_judgements(judged, documents) == [("A text", 4.0), ("Another", 1.5)]
    for records, message in [
        ([{"id": "b", "score": 1}], "line 1: id 'b' has no text"),
        ([{"text": "x", "score": 1}, {"text": "x"}], "line 2: no JSON object with score"),
        ([{"text": "x", "score": "good"}], "score 'good' is no number"),
        ([{"text": "x", "score": float("nan")}], "score nan is no number"),
        ([{"id": [1], "score": 1}], r"line 1: id \[1\] has no text"),
    ]:
        with pytest.raises(UserError, match=message):
            read_judgements(_write(tmp_path / "bad.jsonl", records), documents)


def test_documents_may_be_what_a_curation_wrote(tmp_path):
    documents = Path(_write(tmp_path / "00000.jsonl", [{"id": 7, "text": "A text"}]))
    judged = _write(tmp_path / "judged.jsonl", [{"id": "7", "score": 4}])
    (tmp_path / "00000.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(documents.read_bytes()))
    assert read_judgements(judged, str(tmp_path / "00000.jsonl.zst")) == [("A text", 4.0)]
    (tmp_path / "00000.jsonl.zst").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"00000\.jsonl\.zst: cannot be read"):
        read_judgements(judged, str(tmp_path / "00000.jsonl.zst"))


def test_labels_are_texts(tmp_path):
    assert read_labels(_write(tmp_path / "a.jsonl", [{"text": "x", "label": "code"}])) == [("x", "code")]
    for record in ({"text": "x", "label": 3}, {"text": None, "label": "a"}, {"text": "x"}):
        with pytest.raises(UserError, match=r"a\.jsonl, line 2: "):
            read_labels(_write(tmp_path / "a.jsonl", [{"text": "x", "label": "code"}, record]))


def test_classes_of_unequal_size_weigh_the_same():
    """Texts that say nothing: of 90 good and 10 bad ones, each class has half of the probability."""
    texts, labels = ["the same text"] * 100, ["good"] * 90 + ["bad"] * 10
    for model in (LinearClassifier.train_on(texts, labels, buckets=1 << 10), EncoderClassifier.train_on(texts, labels, **SMALL_ENCODER)):
        assert model.probabilities(["the same text"]).min() > 0.3  # 0.1 without weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "encoder"])
def test_the_tool_trains_from_a_judges_file(tmp_path, kind):
    texts, labels = examples(60, 0)
    judged = _write(tmp_path / "judged.jsonl", [{"text": t, "score": 4 if n == "good" else 1} for t, n in zip(texts, labels)])
    command = [sys.executable, TOOL, "--judgements", judged, "--min-score", "3", "--kind", kind, "--output", tmp_path / "model.npz"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "held out: " in result.stdout
    assert "area under the ROC curve" in result.stdout
    assert load_classifier(tmp_path / "model.npz").config.labels == ["bad", "good"]
    refused = subprocess.run([*command[:5], "9", *command[6:-1], tmp_path / "none.npz"], capture_output=True, text=True)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "give at least 10 of two classes" in refused.stderr
    assert not (tmp_path / "none.npz").exists()
