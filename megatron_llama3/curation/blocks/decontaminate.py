"""Training documents that hold evaluation examples, found by n-grams (paper 5.1.4: 8-grams, and a share of an example's tokens).

The paper's measure turned round: an example is in a document if the n-grams that both have cover at least a given share of
the example's words. So a common phrase drops nothing, and one question in a long document drops it.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.text.words import ngram_hashes, split_words, word_hashes


class DecontaminationFilter(BaseFilter):
    """Drops documents that hold an evaluation example (`contaminated_SET`); which one, and how much of it, goes into `contaminated_by`.

    evaluation_sets: name -> JSONL file. keys: the fields that hold text, each compared by itself; none given: every field that is a string.
    ngram: words an n-gram. min_share: of an example's words; a number or one for each set (the paper chooses one for each).
    Texts shorter than an n-gram would match by accident and are not looked for; the report says how many there were.
    """

    name = "Decontamination"

    def __init__(
        self,
        evaluation_sets: dict[str, str],
        keys: list[str] | None = None,
        ngram: int = 8,
        min_share: float | dict[str, float] = 0.6,
        exclusion_writer: DiskWriter | None = None,
    ):
        super().__init__(exclusion_writer)
        if ngram < 1 or not evaluation_sets:
            raise UserError(f"ngram {ngram}, evaluation_sets {evaluation_sets}: an n-gram has at least one word, and there must be a set")
        self.index = EvaluationIndex(evaluation_sets, keys, ngram)
        self.notes = [f"{len(self.index.examples):,} evaluation texts looked for"]
        if self.index.too_short:
            self.notes.append(f"{self.index.too_short:,} evaluation texts have fewer than {ngram} words and were not looked for")
        self.min_share = min_share if isinstance(min_share, dict) else dict.fromkeys(evaluation_sets, min_share)
        if missing := set(evaluation_sets) - set(self.min_share):
            raise UserError(
                f"min_share: has no value for {', '.join(sorted(missing))}; give one for each of evaluation_sets, or a single number"
            )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        shares = self.index.shares(doc.text)
        found = [(share, *self.index.examples[i]) for i, share in shares.items() if share >= self.min_share[self.index.examples[i][0]]]
        if not found:
            return True
        share, name, line = max(found)
        doc.metadata["contaminated_by"] = {"set": name, "line": line, "share": round(share, 3), "examples": len(found)}
        return False, f"contaminated_{name}"


class EvaluationIndex:
    """Every n-gram of every evaluation text, sorted by hash.

    examples: (set, line in its file) of each text; lengths: its words; too_short: how many were left out.
    """

    def __init__(self, evaluation_sets: dict[str, str], keys: list[str] | None, ngram: int):
        self.ngram, self.too_short = ngram, 0
        self.examples: list[tuple[str, int]] = []
        self.lengths: list[int] = []
        grams, owners, positions = [], [], []
        for name, path in evaluation_sets.items():
            for line, text in read_texts(path, keys):
                hashes = word_hashes(split_words(text))
                if len(hashes) < ngram:
                    self.too_short += 1
                    continue
                grams.append(ngram_hashes(hashes, ngram))
                owners.append(np.full(len(grams[-1]), len(self.examples)))
                positions.append(np.arange(len(grams[-1])))
                self.examples.append((name, line))
                self.lengths.append(len(hashes))
        if not grams:
            raise UserError(f"evaluation_sets {', '.join(evaluation_sets)}: no text of {ngram} words or more in them; nothing can be found")
        order = np.argsort(np.concatenate(grams), kind="stable")
        self.grams, self.owners, self.positions = (np.concatenate(part)[order] for part in (grams, owners, positions))

    def shares(self, text: str) -> dict[int, float]:
        """For each example with an n-gram in `text`: the share of its words that such n-grams cover."""
        grams = np.unique(ngram_hashes(word_hashes(split_words(text)), self.ngram))
        first, last = np.searchsorted(self.grams, grams, "left"), np.searchsorted(self.grams, grams, "right")
        starts: dict[int, list[int]] = defaultdict(list)
        for i in np.flatnonzero(last > first):
            for entry in range(first[i], last[i]):
                starts[int(self.owners[entry])].append(int(self.positions[entry]))
        return {example: self._covered(example, found) for example, found in starts.items()}

    def _covered(self, example: int, starts: list[int]) -> float:
        covered = np.zeros(self.lengths[example], dtype=bool)
        for start in starts:
            covered[start : start + self.ngram] = True
        return float(covered.mean())


def read_texts(path: str, keys: list[str] | None) -> list[tuple[int, str]]:
    """(line number, text) of the fields of a JSONL file. Raises UserError for a line that is no object or lacks a key."""
    texts = []
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation_sets {path}: cannot be read ({error}); give a JSONL file") from error
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            fields = [record[key] for key in keys] if keys else [v for v in record.values() if isinstance(v, str)]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"evaluation_sets {path}, line {number}: no JSON object with {keys or 'text'} ({error!r})") from error
        texts += [(number, str(field)) for field in fields]
    return texts
