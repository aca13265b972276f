"""Domain labels, the paper's knowledge classification (3.1.2), by a trained classifier."""

import os

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.classifiers.model_file import load_classifier, load_for_task


class DomainLabel(PipelineStep):
    """Writes each document's most probable domain and its probability to `domain` and `domain_score`; drops nothing.

    model: a file of tools/train_quality.py --domains. main_language: documents whose `language` is another are `multilingual`, whatever
    the model says. batch_size: documents labelled at a time.
    """

    type = "LABEL"
    name = "domain"

    def __init__(self, model: str, main_language: str = "en", batch_size: int = 64):
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        super().__init__()
        load_classifier(model)  # a run that cannot end is not begun
        self.path, self.main_language, self.batch_size = os.path.abspath(model), main_language, batch_size
        self._model = None

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self._model = self._model or load_for_task(self.path)
        for batch in batched(data, self.batch_size):
            mine = [doc for doc in batch if doc.metadata.get("language", self.main_language) == self.main_language]
            for doc in batch:
                doc.metadata["domain"], doc.metadata["domain_score"] = "multilingual", 1.0
            for doc, row in zip(mine, self._model.probabilities([doc.text for doc in mine])):
                doc.metadata["domain"] = self._model.config.labels[int(row.argmax())]
                doc.metadata["domain_score"] = round(float(row.max()), 4)
            for doc in batch:
                self.stat_update(f"domain_{doc.metadata['domain']}")
            yield from batch
