"""Running a step over texts, as a pipeline would."""

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_llama3.curation.global_block import GlobalBlock


def document(text: str, identity: str = "0", **metadata) -> Document:
    return Document(text, identity, metadata=metadata)


def judge(step: BaseFilter, text: str, **metadata) -> tuple[str | None, Document]:
    """The reason for which a filter drops a text, None where it keeps it; and the document, as the filter leaves it."""
    doc = document(text, **metadata)
    result = step.filter(doc)
    kept, reason = result if isinstance(result, tuple) else (result, None)
    assert kept or reason, "dropped without a reason"
    return (None if kept else reason), doc


def both_passes(block: GlobalBlock, documents: list[Document], folder: str, tasks: int = 2) -> tuple[list[Document], dict[str, str]]:
    """What a block that sees the whole corpus keeps, and id -> reason of what it drops, with the documents dealt to tasks."""
    shares = [documents[rank::tasks] for rank in range(tasks)]
    for rank, share in enumerate(shares):
        for _ in block.collect(folder, tasks).run(iter(share), rank, tasks):
            pass
    for search in block.search(folder, tasks):
        for rank in range(search.tasks):
            search.step.run(None, rank, search.tasks)
    step, kept, reasons = block.apply(folder), [], {}
    writer = _Writer(reasons)
    step.exclusion_writer = writer
    for rank, share in enumerate(shares):
        kept += step.run(iter(share), rank, tasks)
    return kept, reasons


class _Writer:
    def __init__(self, reasons: dict[str, str]):
        self.reasons = reasons

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def write(self, doc: Document, rank: int) -> None:
        self.reasons[doc.id] = doc.metadata["filter_reason"]
