"""What a block kept, changed and dropped, with samples: counted around the block, so that every datatrove step is reported alike.

A document that makes a block raise is broken: it is counted and sampled like a dropped one, and the block goes on with the next.
"""

import math
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.storage.files import task_file, whole_file

SAMPLES = 3
_SAMPLE_CHARACTERS = 600
_MAX_REASONS = 200
_KINDS = ("language", "domain")
_FATAL = (UserError, OSError, MemoryError, ImportError)  # about the run, not about a document


@dataclass
class Tally:
    """One row of the funnel. Samples are those of the smallest checksums of their ids: the same ones under any number of tasks."""

    name: str
    documents_in: int = 0
    characters_in: int = 0
    documents_out: int = 0
    characters_out: int = 0
    changed: int = 0
    characters_removed: int = 0  # out of documents that go on: markup, lines, personal data; less what was added
    reasons: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[list]] = field(default_factory=dict)  # reason, "changed", "kept" -> [checksum, id, text before, text after]
    kinds: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # "language", "domain" -> value -> [documents, characters] out
    score: str = ""  # the metadata entry by which the block judges
    score_width: float = 0.0
    threshold: float | None = None  # of the score, where one number divides what is kept from what is dropped
    scores: dict[str, list[int]] = field(default_factory=dict)  # floor(score / score_width) -> [kept, dropped]
    notes: list[str] = field(default_factory=list)  # what the block has to say, the same in every task

    def enters(self, document: Document) -> None:
        self.documents_in += 1
        self.characters_in += len(document.text)

    def leaves(self, document: Document, before: str | None = None) -> None:
        """before: the text that entered, where there was one."""
        self.documents_out += 1
        self.characters_out += len(document.text)
        for kind in _KINDS:
            if kind in document.metadata:
                self._count_kind(kind, str(document.metadata[kind]), len(document.text))
        if before is not None and before != document.text:
            self.changed += 1
            self.characters_removed += len(before) - len(document.text)
            self._sample("changed", document.id, before, document.text)
        else:
            self._sample("kept", document.id, document.text, "")

    def _count_kind(self, kind: str, value: str, characters: int) -> None:
        counts = self.kinds.setdefault(kind, {})
        count = counts.setdefault(value if value in counts or len(counts) < _MAX_REASONS else "other", [0, 0])
        count[0] += 1
        count[1] += characters

    def judged(self, document: Document, dropped: bool) -> None:
        """Counts the score by which the block judged the document."""
        value = document.metadata.get(self.score) if self.score else None
        if isinstance(value, int | float) and math.isfinite(value):
            self.scores.setdefault(str(math.floor(value / self.score_width)), [0, 0])[dropped] += 1

    def drops(self, identity: str, text: str, reason: str, entered: int = 1) -> None:
        """entered: 0 for what never was a document."""
        self.documents_in += 1 - entered
        if reason not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            reason = "other reasons"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self._sample(reason, identity, text, "")

    def _sample(self, reason: str, identity: str, before: str, after: str) -> None:
        kept = self.samples.setdefault(reason, [])
        checksum = zlib.crc32(identity.encode())
        if len(kept) < SAMPLES or checksum < kept[-1][0]:
            kept.append([checksum, identity, *_excerpts(before, after)])
            kept.sort()
            del kept[SAMPLES:]

    def add(self, other: "Tally") -> None:
        for name in ("documents_in", "characters_in", "documents_out", "characters_out", "changed", "characters_removed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons = dict(Counter(self.reasons) + Counter(other.reasons))
        for reason, samples in other.samples.items():
            self.samples[reason] = sorted(self.samples.get(reason, []) + samples)[:SAMPLES]
        self.score, self.score_width, self.threshold = other.score, other.score_width, other.threshold
        for mine, others in ((self.scores, other.scores), *((self.kinds.setdefault(kind, {}), other.kinds[kind]) for kind in other.kinds)):
            for name, counts in others.items():
                mine[name] = [a + b for a, b in zip(mine.get(name, [0, 0]), counts)]
        self.notes += [note for note in other.notes if note not in self.notes]


def _excerpts(before: str, after: str) -> tuple[str, str]:
    """The first characters of both, from a little before where they begin to differ."""
    same = 0
    if after:
        limit = min(len(before), len(after))
        same = next((place for place in range(limit) if before[place] != after[place]), limit)
    begin = max(same - 80, 0)
    return before[begin : begin + _SAMPLE_CHARACTERS], after[begin : begin + _SAMPLE_CHARACTERS]


class _Reasons:
    """Stands where a filter expects a writer for what it drops; having one makes the filter note its reason in the document."""

    def __enter__(self) -> "_Reasons":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def write(self, document: Document, rank: int) -> None:
        pass


class Observed(PipelineStep):
    """A block with its tally. The block may drop documents and change their texts, in order; it may hold a batch back."""

    type = "BLOCK"

    def __init__(self, name: str, block: PipelineStep):
        super().__init__()
        score, width = getattr(block, "score", ("", 0.0))  # a block that has one names it: (metadata entry, width of a bar in the report)
        threshold = getattr(block, "score_threshold", None)
        self.name, self.block, self.tally = name, block, Tally(name, score=score, score_width=width, threshold=threshold)
        if isinstance(block, BaseFilter) and block.exclusion_writer is None:
            block.exclusion_writer = _Reasons()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        source = iter(data)
        while True:
            inside: deque[tuple[Document, str]] = deque()  # documents that the block holds, with the texts they entered with
            upstream: list[Exception] = []
            try:
                for document in self.block.run(self._feed(source, inside, upstream), rank, world_size):
                    self._settle(document, inside)
                    yield document
                self._drop_all(inside)
                self.tally.notes = list(getattr(self.block, "notes", ()))
                return
            except _FATAL:
                raise
            except Exception as error:
                if upstream or not inside or getattr(self.block, "positional", False):
                    raise
                broken = error
            if len(inside) == 1:
                self._breaks(*inside.pop(), broken)
            yield from self._one_by_one(inside, rank, world_size)

    def _feed(self, source: Iterator[Document], inside: deque, upstream: list[Exception]) -> Iterator[Document]:
        try:
            for document in source:
                self.tally.enters(document)
                inside.append((document, document.text))
                yield document
        except Exception as error:
            upstream.append(error)
            raise

    def _one_by_one(self, inside: deque, rank: int, world_size: int) -> Iterator[Document]:
        """A batch of which one document broke."""
        for document, before in inside:
            document.text = before
            alone = deque([(document, before)])
            try:
                for passed in list(self.block.run(iter([document]), rank, world_size)):
                    self._settle(passed, alone)
                    yield passed
                self._drop_all(alone)
            except _FATAL:
                raise
            except Exception as error:
                self._breaks(document, before, error)

    def _settle(self, document: Document, inside: deque) -> None:
        """`document` left the block: what entered before it and has not left was dropped."""
        before = None
        if any(held is document for held, _ in inside):
            while (entered := inside.popleft())[0] is not document:
                self._drop_all([entered])
            before = entered[1]
            self.tally.judged(document, dropped=False)
        self.tally.leaves(document, before)

    def _drop_all(self, inside: Iterable[tuple[Document, str]]) -> None:
        for document, before in inside:
            self.tally.judged(document, dropped=True)
            self.tally.drops(document.id, before, str(document.metadata.get("filter_reason", "dropped")))

    def _breaks(self, document: Document, before: str, error: Exception) -> None:
        self.tally.drops(document.id, before, f"error: {type(error).__name__}: {error}"[:120])


class WriteTallies(PipelineStep):
    """The last step of a task: `FOLDER/RANK.json`, the tallies of its steps."""

    type = "REPORT"
    name = "tallies"

    def __init__(self, folder: str, steps: list[PipelineStep]):
        super().__init__()
        self.folder, self.steps = folder, steps

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        for _ in data:
            pass
        with whole_file(task_file(self.folder, rank, "json")) as file:
            file.write(orjson.dumps([asdict(step.tally) for step in self.steps]))


def read_tallies(folder: str, ranks: int) -> list[Tally]:
    """The sum over all tasks, a tally for each step."""
    total: list[Tally] = []
    for rank in range(ranks):
        with open(task_file(folder, rank, "json"), "rb") as file:
            rows = [Tally(**row) for row in orjson.loads(file.read())]
        total = total or [Tally(row.name) for row in rows]
        for tally, row in zip(total, rows):
            tally.add(row)
    return total
