"""The filter scores and drops by a trained model; judges' files and labels are read."""

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.quality import QualityFilter, ranking_quality, read_judgements, read_labels
from tests.curation.classifiers.models import examples, trained
from tests.curation.steps import document, judge


def test_the_filter_scores_every_document_and_drops_the_bad(tmp_path):
    trained().save(tmp_path / "model.npz")
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


def test_area_under_the_curve():
    assert ranking_quality([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert ranking_quality([0.5, 0.5], [True, False]) == 0.5


def write_records(path, records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return str(path)


def test_judgements_have_texts_or_ids(tmp_path):
    documents = write_records(tmp_path / "documents.jsonl", [{"id": "a", "text": "A text"}])
    judged = write_records(tmp_path / "judged.jsonl", [{"id": "a", "score": 4}, {"text": "Another", "score": "1.5"}])
    assert read_judgements(judged, documents) == [("A text", 4.0), ("Another", 1.5)]
    for records, message in [
        ([{"id": "b", "score": 1}], "line 1: id 'b' has no text"),
        ([{"text": "x", "score": 1}, {"text": "x"}], "line 2: no JSON object with score"),
        ([{"text": "x", "score": "good"}], "score 'good' is no number"),
        ([{"text": "x", "score": float("nan")}], "score nan is no number"),
        ([{"id": [1], "score": 1}], r"line 1: id \[1\] has no text"),
    ]:
        with pytest.raises(UserError, match=message):
            read_judgements(write_records(tmp_path / "bad.jsonl", records), documents)


def test_documents_may_be_what_a_curation_wrote(tmp_path):
    documents = Path(write_records(tmp_path / "00000.jsonl", [{"id": 7, "text": "A text"}]))
    judged = write_records(tmp_path / "judged.jsonl", [{"id": "7", "score": 4}])
    (tmp_path / "00000.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(documents.read_bytes()))
    assert read_judgements(judged, str(tmp_path / "00000.jsonl.zst")) == [("A text", 4.0)]
    (tmp_path / "00000.jsonl.zst").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"00000\.jsonl\.zst: cannot be read"):
        read_judgements(judged, str(tmp_path / "00000.jsonl.zst"))


def test_labels_are_texts(tmp_path):
    assert read_labels(write_records(tmp_path / "a.jsonl", [{"text": "x", "label": "code"}])) == [("x", "code")]
    for record in ({"text": "x", "label": 3}, {"text": None, "label": "a"}, {"text": "x"}):
        with pytest.raises(UserError, match=r"a\.jsonl, line 2: "):
            read_labels(write_records(tmp_path / "a.jsonl", [{"text": "x", "label": "code"}, record]))
