"""Domain labels, the paper's knowledge classification (3.1.2), by a trained classifier."""

import os

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from megatron_llama3.curation.classifier_file import load_classifier


class DomainLabel(PipelineStep):
    """Writes each document's most probable domain and its probability to `domain` and `domain_score`; drops nothing.

    model: a file of tools/train_quality.py --domains. main_language: documents whose `language` is another are `multilingual`, whatever
    the model says.
    """

    type = "LABEL"
    name = "domain"

    def __init__(self, model: str, main_language: str = "en"):
        super().__init__()
        load_classifier(model)  # a run that cannot end is not begun
        self.path, self.main_language = os.path.abspath(model), main_language
        self._model = None

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self._model = self._model or load_classifier(self.path)
        for doc in data:
            if doc.metadata.get("language", self.main_language) != self.main_language:
                domain, score = "multilingual", 1.0
            else:
                row = self._model.probabilities([doc.text])[0]
                domain, score = self._model.config.labels[int(row.argmax())], round(float(row.max()), 4)
            doc.metadata["domain"], doc.metadata["domain_score"] = domain, score
            self.stat_update(f"domain_{domain}")
            yield doc
