"""The training mix (paper 3.1.2): tokens of each domain, how often to take its documents for a target mix, and taking them.

The paper's final mix: half general knowledge, a quarter mathematics and reasoning, 17% code, 8% multilingual.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.global_block import GlobalBlock, Search
from megatron_llama3.curation.storage.files import whole_file
from megatron_llama3.curation.storage.task_counts import read_task_counts, write_task_counts
from megatron_llama3.tokenizer.llama3 import load_tokenizer

_BYTES_A_TOKEN = 4
_PARTS = 4096  # of a domain, by hash: the mix is met to one of them
_CLOSE = 0.05  # what misses its plan by more is said
PAPER_MIX = {"general": 0.50, "reasoning": 0.25, "code": 0.17, "multilingual": 0.08}


@dataclass(frozen=True)
class DomainPlan:
    """tokens: what there is; epochs: how often each document is taken, on average; wanted, given: tokens of the mix and what can be had."""

    tokens: int
    epochs: float
    wanted: int
    given: int


def plan_mixture(
    tokens: dict[str, int], target: dict[str, float], total: int | None = None, max_epochs: float = 4.0
) -> tuple[dict[str, DomainPlan], list[str]]:
    """How often to take each domain's documents, and a line for each domain that falls short.

    tokens: domain -> how many there are; target: domain -> share (any positive numbers). total: tokens of the mix; by default as many as
    the scarcest domain allows at `max_epochs`, so that no share suffers. Raises UserError for a domain without tokens or without a share.
    """
    shares = _shares(target)
    for domain in tokens:
        if domain not in shares:
            raise UserError(f"target: has no share for domain '{domain}', which has {tokens[domain]:,} tokens; give it one (0 drops it)")
    missing = [domain for domain, share in shares.items() if share and not tokens.get(domain)]
    if missing:
        raise UserError(f"target: asks for {', '.join(missing)}, of which there is no document; remove it or add data")
    if total is None:
        total = int(min(tokens[domain] * max_epochs / share for domain, share in shares.items() if share))
    plans, shortages = {}, []
    for domain, share in shares.items():
        have, wanted = tokens.get(domain, 0), round(total * share)
        epochs = min(wanted / have if have else 0.0, max_epochs)
        plans[domain] = DomainPlan(have, epochs, wanted, round(have * epochs))
        if wanted > round(have * max_epochs):
            shortages.append(f"{domain}: {have:,} tokens at {max_epochs:g} epochs give {plans[domain].given:,} of the {wanted:,} wanted")
    return plans, shortages


def _shares(target: dict[str, float]) -> dict[str, float]:
    if not target or min(target.values()) < 0 or sum(target.values()) <= 0:
        raise UserError(f"target {target}: give each domain a share of 0 or more, and one above 0")
    return {domain: share / sum(target.values()) for domain, share in target.items()}


def copies(identity: str, epochs: float, seed: int) -> int:
    """How often a document is taken: floor(epochs), and one more for that fraction of documents whose hash is lowest.

    So a document kept at some rate is also kept at every higher one, and no order or number of tasks changes the choice.
    """
    return int(epochs) + (_fraction(identity, seed) < epochs - int(epochs))


def _fraction(identity: str, seed: int) -> float:
    """In [0, 1): a float of the hash's upper 53 bits, exactly."""
    return (xxhash.xxh3_64_intdigest(identity.encode("utf-8", "surrogatepass"), seed=seed) >> 11) / 2**53


def _name(doc: Document) -> str:
    """What stands for a document: ids need not be unique, and equal ones shall not share their fate."""
    return f"{doc.id} {xxhash.xxh3_64_hexdigest(doc.text.encode('utf-8', 'surrogatepass'))}"


def met_epochs(parts: list[int], epochs: float) -> tuple[float, int]:
    """The epochs, a multiple of 1/len(parts), that come closest to `epochs` times all tokens; and the tokens that they give.

    parts: a domain's tokens by its documents' hashes. Documents differ in length, so that a third of them is not a third of the tokens.
    """
    tokens = np.concatenate([[0], np.cumsum(np.array(parts, dtype=np.int64))])
    whole = int(epochs)
    taken = int(np.abs(tokens - (epochs - whole) * tokens[-1]).argmin())
    return whole + taken / len(parts), int(whole * tokens[-1] + tokens[taken])


class Mixture(GlobalBlock):
    """Takes documents so that the tokens of the domains stand in the target's proportions: fewer of what there is too much of, some again.

    Documents are taken by a hash of id and text, up to that of 4,096 parts of a domain at which its tokens come closest to its share; where
    a few long documents are too much or too little, a note in the report says so.
    Left out are documents of domains that have too many (`over_represented`) or no share (`no_share`); repetitions have `#2`, ... after
    their id.

    target: domain -> share; by default the paper's, general 0.50, reasoning 0.25, code 0.17, multilingual 0.08. tokens: of the mix; by
    default as many as the scarcest domain allows. max_epochs: how often a document may be taken; a domain that then falls short is
    reported. seed: another one chooses other documents. tokenizer: a tokenizer.model or tokenizer.json to count with; without one a token
    is four bytes. key: the metadata entry.
    """

    def __init__(
        self,
        target: dict[str, float] | None = None,
        tokens: int | None = None,
        max_epochs: float = 4.0,
        seed: int = 0,
        tokenizer: str | None = None,
        key: str = "domain",
    ):
        if not 0 < max_epochs < math.inf or (tokens is not None and tokens < 1) or seed < 0:
            raise UserError(f"max_epochs {max_epochs}, tokens {tokens}, seed {seed}: must be above 0, at least 1, and at least 0")
        self.target, self.tokens, self.max_epochs, self.seed = target or PAPER_MIX, tokens, max_epochs, seed
        self.tokenizer, self.key = os.path.abspath(tokenizer) if tokenizer else None, key
        if tokenizer:
            load_tokenizer(tokenizer)  # a run that cannot end is not begun
        _shares(self.target)

    def collect(self, folder: str, partitions: int) -> PipelineStep:
        return CountTokens(folder, self.key, self.tokenizer, self.seed)

    def search(self, folder: str, tasks: int) -> list[Search]:
        return [Search("plan", 1, PlanMixture(folder, self._plan(folder), self.target, self.tokens, self.max_epochs))]

    def apply(self, folder: str) -> PipelineStep:
        return SampleMixture(self._plan(folder), self.seed, self.key)

    def _plan(self, folder: str) -> str:
        return os.path.join(folder, "plan", "plan.json")


class CountTokens(PipelineStep):
    """First pass: domain -> tokens of each part of its documents."""

    type = "STATS"
    name = "tokens by domain"

    def __init__(self, folder: str, key: str, tokenizer: str | None, seed: int):
        super().__init__()
        self.folder, self.key, self.tokenizer, self.seed = folder, key, tokenizer, seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        encode = load_tokenizer(self.tokenizer).encode if self.tokenizer else None
        parts: dict[str, list[int]] = {}
        for doc in data:
            tokens = len(encode(doc.text)) if encode else -(-len(doc.text.encode("utf-8", "replace")) // _BYTES_A_TOKEN)
            parts.setdefault(_domain(doc, self.key), [0] * _PARTS)[int(_fraction(_name(doc), self.seed) * _PARTS)] += tokens
            yield doc
        write_task_counts(self.folder, rank, world_size, parts)


class PlanMixture(PipelineStep):
    """How often to take each domain's documents, from the counts of all tasks; and what the report says of it."""

    type = "STATS"
    name = "mixture"

    def __init__(self, folder: str, output: str, target: dict[str, float], tokens: int | None, max_epochs: float):
        super().__init__()
        self.folder, self.output, self.target, self.tokens, self.max_epochs = folder, output, target, tokens, max_epochs

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        parts: dict[str, np.ndarray] = {}
        for task in read_task_counts(self.folder):
            for domain, tokens in task.items():
                parts[domain] = parts.get(domain, 0) + np.array(tokens)
        plans, shortages = plan_mixture({name: int(part.sum()) for name, part in parts.items()}, self.target, self.tokens, self.max_epochs)
        met = {name: met_epochs(parts.get(name, [0]), plan.epochs) for name, plan in plans.items()}
        whole = max(1, sum(given for _, given in met.values()))
        wanted = max(1, sum(plan.wanted for plan in plans.values()))
        notes = [
            f"{name}: {given:,} tokens, {given / whole:.1%} of the mix (wanted: {plans[name].wanted / wanted:.1%}), "
            f"from {plans[name].tokens:,}: each document taken {epochs:.3g} times"
            for name, (epochs, given) in met.items()
        ]
        notes += [f"falls short: {line}" for line in shortages]
        for name, (_, given) in met.items():
            if plans[name].given and abs(given - plans[name].given) > _CLOSE * plans[name].given:
                notes.append(f"{name}: planned were {plans[name].given:,} tokens; its documents are too long to come closer than {given:,}")
        epochs = {name: epochs for name, (epochs, _) in met.items()}
        unwanted = [name for name, plan in plans.items() if not plan.wanted]
        with whole_file(self.output) as file:
            file.write(json.dumps({"epochs": epochs, "unwanted": unwanted, "notes": notes}).encode())


class SampleMixture(BaseFilter):
    """Second pass."""

    name = "mixture"

    def __init__(self, plan: str, seed: int, key: str):
        super().__init__()
        self.plan, self.seed, self.key = plan, seed, key
        self.notes: list[str] = []
        self._epochs: dict[str, float] = {}
        self._unwanted: set[str] = set()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        plan = json.loads(Path(self.plan).read_bytes())
        self._epochs, self._unwanted, self.notes = plan["epochs"], set(plan["unwanted"]), plan["notes"]
        for doc in super().run(data, rank, world_size):
            again = range(2, self._copies(doc) + 1)
            text, identity, metadata = doc.text, doc.id, dict(doc.metadata)
            yield doc
            for number in again:
                yield Document(text, f"{identity}#{number}", metadata=dict(metadata))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._copies(doc):
            return True
        return False, "no_share" if _domain(doc, self.key) in self._unwanted else "over_represented"

    def _copies(self, doc: Document) -> int:
        return copies(_name(doc), self._epochs[_domain(doc, self.key)], self.seed)


def _domain(doc: Document, key: str) -> str:
    return str(doc.metadata.get(key, "none"))
