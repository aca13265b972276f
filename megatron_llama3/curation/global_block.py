"""What blocks are made of beyond datatrove's own steps: blocks that see the whole corpus, and the filter that applies what they found."""

import os
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_llama3.curation.storage.records import RecordReader


class Search(NamedTuple):
    """A pass over what was collected: its name, its number of tasks, and the step that each task runs."""

    name: str
    tasks: int
    step: PipelineStep


class GlobalBlock(ABC):
    """A block whose verdict on a document needs the whole corpus: it collects, searches, and goes over the documents again."""

    @abstractmethod
    def collect(self, folder: str, partitions: int) -> PipelineStep:
        """The step that passes every document on and leaves what the search needs in `folder`."""

    @abstractmethod
    def search(self, folder: str, tasks: int) -> list[Search]:
        """The passes over it, in order. tasks: how many tasks collected; also the number of partitions."""

    @abstractmethod
    def apply(self, folder: str) -> PipelineStep:
        """The step that drops or changes documents, given the same documents in the same order as `collect` was."""


class DropListed(BaseFilter):
    """Drops the documents whose numbers, counted through all tasks, are in the arrays of folder `listed`, each sorted."""

    name = "listed documents"
    positional = True

    def __init__(self, folder: str, listed: str, reason: str):
        super().__init__()
        self.folder, self.listed, self.reason = folder, listed, reason

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        first = RecordReader(self.folder, world_size, np.dtype("u1")).first
        self._next, self._dropped = int(first[rank]), set()
        for name in sorted(name for name in os.listdir(self.listed) if name.endswith(".npy")):
            numbers = np.load(os.path.join(self.listed, name), mmap_mode="r")
            begin, end = np.searchsorted(numbers, first[rank : rank + 2])
            self._dropped.update(numbers[begin:end].tolist())
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        self._next += 1
        return (False, self.reason) if self._next - 1 in self._dropped else True
