"""Quality by a trained model (paper 3.1.1): labels from a judge's file, and a filter that scores and drops.

A judge (the paper asked Llama 2 chat whether a document meets stated requirements) leaves JSONL: `text`, or the `id` of a document
elsewhere, and `score`.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.classifiers.model_file import load_classifier, load_for_task
from megatron_llama3.data.preprocess_inputs import decompression_errors, open_source

GOOD, BAD = "good", "bad"


class QualityFilter(BaseFilter):
    """Drops documents (`low_quality`) whose probability of `label` is below `min_score`; leaves it in `quality_score`.

    model: a file of tools/train_quality.py, of any kind; read at once to be checked, and again by each task. batch_size:
    documents judged at a time.
    """

    name = "Quality"
    score = ("quality_score", 0.05)

    def __init__(
        self, model: str, min_score: float = 0.5, label: str = GOOD, batch_size: int = 64, exclusion_writer: DiskWriter | None = None
    ):
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        super().__init__(exclusion_writer, batch_size)
        self.path, self.min_score = os.path.abspath(model), min_score
        self.score_threshold = min_score
        self._column = column_of(load_classifier(model), label, model)
        self._model = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        if self._model is None:
            self._model = load_for_task(self.path)
        scores = self._model.probabilities([doc.text for doc in batch])[:, self._column]
        for doc, score in zip(batch, scores):
            doc.metadata["quality_score"] = round(float(score), 4)
        return [True if score >= self.min_score else (False, "low_quality") for score in scores]


def column_of(model, label: str, path: str) -> int:
    """The column of a label. Raises UserError where the model has none of that name."""
    labels = list(model.config.labels)
    if label not in labels:
        raise UserError(f"label {label}: {path} knows {', '.join(labels)}")
    return labels.index(label)


def read_judgements(path: str, documents: str | None = None) -> list[tuple[str, float]]:
    """(text, score) of each line of a judge's JSONL file; texts that it lacks come from `documents` (JSONL with `id` and `text`) by id.

    Raises UserError for a line without a score, or whose text is nowhere.
    """
    texts = {str(record["id"]): record["text"] for _, record in _records(documents, "id", "text")} if documents else {}
    judged = []
    for number, record in _records(path, "score"):
        text = record.get("text", texts.get(str(record.get("id"))))
        if not isinstance(text, str):
            where = f"nor in --documents {documents}" if documents else "and there is no --documents"
            raise UserError(f"{path}, line {number}: id {record.get('id')!r} has no text here {where}")
        try:
            score = float(record["score"])
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise UserError(f"{path}, line {number}: score {record['score']!r} is no number")
        judged.append((text, score))
    return judged


def read_labels(path: str) -> list[tuple[str, str]]:
    """(text, label) of each line of JSONL. Raises UserError for a line that lacks one of them, or where it is no text."""
    labelled = []
    for number, record in _records(path, "text", "label"):
        if not isinstance(record["text"], str) or not isinstance(record["label"], str):
            raise UserError(f"{path}, line {number}: text and label must both be strings")
        labelled.append((record["text"], record["label"]))
    return labelled


def _records(path: str, *keys: str) -> Iterator[tuple[int, dict]]:
    """(line, record) of JSONL, also .gz and .zst, as curate_data.py writes it."""
    suffix = Path(path).suffix
    try:
        with io.TextIOWrapper(open_source(path, suffix if suffix in (".gz", ".zst") else ""), encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict) or any(key not in record for key in keys):
                        raise UserError(f"{path}, line {number}: no JSON object with {' and '.join(keys)}")
                    yield number, record
    except (*decompression_errors(), OSError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except ValueError as error:
        raise UserError(f"{path}: a line is no JSON ({error})") from error


def ranking_quality(scores: Sequence[float], is_good: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a good text scores above a bad one (ties count half)."""
    scores, good = np.asarray(scores), np.asarray(is_good)
    values, ranks = np.unique(scores, return_inverse=True)
    counts = np.bincount(ranks, minlength=len(values))
    mean_rank = (np.cumsum(counts) - (counts - 1) / 2)[ranks]
    n_good, n_bad = int(good.sum()), int((~good).sum())
    return float((mean_rank[good].sum() - n_good * (n_good + 1) / 2) / max(1, n_good * n_bad))
