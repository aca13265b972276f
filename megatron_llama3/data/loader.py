"""The stream of training batches: which sequence comes when, under any layout, and where it stands, so that it can go on from there.

    train, valid = build_train_and_valid_streams(config)
    batch = train.next_batch(global_batch_size=8, seq_length=1024, micro_batch_size=2, dp_rank=0, dp_size=2)

Every rank advances through the whole global batch by arithmetic, and reads only its own sequences. The position is a small table: for each
dataset, named by its fingerprint, the tokens given (epoch and offset) and the group of blocks whose turn it is (`mixing.py`). A sequence of
s tokens advances its dataset by s. The target of a token is the one after it in the dataset's stream, whichever sequence that one is in.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.blend import next_sources
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.mixing import Group, Mixing, Stretch
from megatron_llama3.data.packing import PackedDocuments
from megatron_llama3.data.same_tokenizer import check_same_tokenizer
from megatron_llama3.data.sources import open_sources, parse_data_path, split_shares

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one data-parallel rank trains on in one step; arrays [num_micro_batches, micro_batch_size, seq_length].

    tokens and targets int64; loss_mask bool; document_ids int32, counting documents within each sequence from 0; position_ids int64.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    document_ids: np.ndarray
    position_ids: np.ndarray


class BatchPlan(NamedTuple):
    """A global batch before it is read."""

    sources: np.ndarray
    """int64 [global_batch_size]: each sequence's source"""
    positions: np.ndarray
    """int64 [global_batch_size]: tokens that the source has given before the sequence"""
    groups: list[Group | None]
    """for each source, the group in which its part begins, or None where its order is the old one"""
    seq_length: int


class TrainingStream:
    """Batches blended from `sources` by integer `weights`, each read in blocks of `longest` tokens; see the module's docstring.

    The loss mask is False where the target belongs to another document than the token, unless `loss_across_documents`.
    Positions run from 0 in each sequence or, with `reset_position_ids`, in each document of a sequence.
    """

    def __init__(
        self,
        sources: Sequence[PackedDocuments],
        weights: Sequence[int],
        vocab_size: int,
        seed: int,
        longest: int,
        reset_position_ids: bool = False,
        loss_across_documents: bool = False,
    ) -> None:
        self.sources, self.weights, self.vocab_size, self.seed = list(sources), list(weights), vocab_size, seed
        self._mixings = [Mixing(s.tokens_per_epoch, longest, f"{s.dataset.fingerprint} {seed}") for s in sources]
        self.reset_position_ids, self.loss_across_documents = reset_position_ids, loss_across_documents
        self.rewind()

    def rewind(self) -> None:
        """Back to the first sequence, as evaluation does each time."""
        self._positions = [0] * len(self.sources)  # tokens given so far, all epochs
        self._groups: list[Group | None] = [mixing.first_group() for mixing in self._mixings]
        self._sequences = [0] * len(self.sources)
        self._sequences_at_weights = [0] * len(self.sources)  # since the blend's weights last changed
        self._past_sources: list[dict[str, Any]] = []  # table rows of datasets that are no longer in the blend

    def plan_batch(self, global_batch_size: int, seq_length: int) -> BatchPlan:
        """Advances by one global batch, without reading."""
        drawn = next_sources(self.weights, self._sequences_at_weights, global_batch_size)
        plan = BatchPlan(drawn, np.empty(global_batch_size, dtype=np.int64), list(self._groups), seq_length)
        for i, mixing in enumerate(self._mixings):
            mine = np.flatnonzero(drawn == i)
            plan.positions[mine] = self._positions[i] + seq_length * np.arange(len(mine))
            self._positions[i] += seq_length * len(mine)
            self._sequences[i] += len(mine)
            self._sequences_at_weights[i] += len(mine)
            if len(mine) and (group := self._groups[i]) is not None:
                group = mixing.group_at(group, int(plan.positions[mine[0]]), seq_length)
                plan.groups[i], self._groups[i] = group, mixing.group_at(group, self._positions[i], seq_length)
        return plan

    def stretches(self, plan: BatchPlan, k: int) -> list[Stretch]:
        """Where sequence `k` of the planned batch lies in its source's stream."""
        source, position = int(plan.sources[k]), int(plan.positions[k])
        group = plan.groups[source]
        if group is None:
            return [Stretch(position, plan.seq_length)]
        return self._mixings[source].stretches(group, position, plan.seq_length)

    def next_batch(self, global_batch_size: int, seq_length: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> Batch:
        """The rows of `dp_rank` in the next global batch: its sequence k goes to micro-batch m, rank d, row j with k = (m * dp_size + d) *
        micro_batch_size + j. Raises UserError if micro_batch_size * dp_size does not divide global_batch_size, or for a token id outside
        the vocabulary.
        """
        if global_batch_size % (micro_batch_size * dp_size):
            product = f"micro-batch size {micro_batch_size} x data-parallel size {dp_size}"
            raise UserError(f"global batch size {global_batch_size} is not divisible by {product}")
        plan = self.plan_batch(global_batch_size, seq_length)
        mine = _rows_of_rank(global_batch_size, micro_batch_size, dp_rank, dp_size)
        rows = [self._read(self.sources[plan.sources[k]], self.stretches(plan, k)) for k in mine.flat]
        return merge_batches(rows, lambda arrays: np.stack(arrays).reshape(*mine.shape, seq_length))

    def read_ahead(self, global_batch_size: int, seq_length: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
        """Has the system begin to read what `next_batch` will want with the same arguments. Does not wait, and moves nothing."""
        kept = [list(of_sources) for of_sources in (self._positions, self._groups, self._sequences, self._sequences_at_weights)]
        plan = self.plan_batch(global_batch_size, seq_length)
        self._positions, self._groups, self._sequences, self._sequences_at_weights = kept
        for k in _rows_of_rank(global_batch_size, micro_batch_size, dp_rank, dp_size).flat:
            for start, length in self.stretches(plan, k):
                self.sources[plan.sources[k]].read_ahead(start, length + 1)

    def _read(self, source: PackedDocuments, stretches: list[Stretch]) -> Batch:
        """One sequence: the arrays of a Batch, each [seq_length]. Stretches share no document, to the model."""
        pieces = [source.read(start, length + 1, self.vocab_size) for start, length in stretches]
        firsts = np.cumsum([0] + [piece.documents[-2] + 1 for piece in pieces[:-1]])
        documents = np.concatenate([piece.documents[:-1] + first for piece, first in zip(pieces, firsts)])
        loss_mask = np.concatenate([piece.documents[1:] == piece.documents[:-1] for piece in pieces])
        tokens, targets = (np.concatenate([piece.tokens[cut] for piece in pieces]) for cut in (slice(-1), slice(1, None)))
        position_ids = np.arange(len(tokens))
        if self.reset_position_ids:
            position_ids -= np.flatnonzero(np.diff(documents, prepend=-1))[documents]
        return Batch(tokens, targets, loss_mask | self.loss_across_documents, documents.astype(np.int32), position_ids)

    def _row(self, i: int) -> dict[str, Any]:
        source = self.sources[i]
        epoch, offset = divmod(self._positions[i], source.tokens_per_epoch)
        group = self._groups[i]
        return {
            "fingerprint": source.dataset.fingerprint,
            "prefix": source.dataset.prefix,
            "documents": [source.first, source.last],
            "epoch": epoch,
            "token_offset": offset,
            "tokens_per_epoch": source.tokens_per_epoch,
            "sequences": self._sequences[i],
            "weight": self.weights[i],
            "sequences_at_weights": self._sequences_at_weights[i],
            "blocks": group and group._asdict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, for JSON: one row a dataset of what it has given, those that left the blend included."""
        return {"seed": self.seed, "sources": [self._row(i) for i in range(len(self.sources))] + self._past_sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. Datasets may have come, gone, moved to other paths or changed weights: each goes on where it stood,
        and in its own order where an older version read it as a stream without blocks.

        Raises UserError where going on would repeat or lose documents: another seed, or another split of the same dataset.
        """
        if state["seed"] != self.seed:
            raise UserError(f"--seed {self.seed}, but the checkpoint's data was shuffled with seed {state['seed']}: documents would repeat")
        self.rewind()
        saved = {row["fingerprint"]: row for row in state["sources"]}
        for i, source in enumerate(self.sources):
            row = saved.pop(source.dataset.fingerprint, None)
            if row is None:
                continue
            if row["documents"] != [source.first, source.last]:
                raise UserError(
                    f"{source.dataset.prefix}: documents {source.first} to {source.last} are for this part of the run, in the checkpoint "
                    f"{row['documents'][0]} to {row['documents'][1]}: documents would repeat; keep --split"
                )
            self._positions[i] = row["epoch"] * source.tokens_per_epoch + row["token_offset"]
            self._sequences[i] = row["sequences"]
            self._groups[i] = self._saved_group(i, row)
        self._past_sources = [{**row, "weight": 0, "sequences_at_weights": 0} for row in saved.values()]
        before = {row["fingerprint"]: row for row in state["sources"] if row["weight"]}
        now = {s.dataset.fingerprint: w for s, w in zip(self.sources, self.weights) if w}
        if {name: row["weight"] for name, row in before.items()} == now:
            self._sequences_at_weights = [
                before[s.dataset.fingerprint]["sequences_at_weights"] if w else 0 for s, w in zip(self.sources, self.weights)
            ]

    def _saved_group(self, i: int, row: dict[str, Any]) -> Group | None:
        if row.get("blocks") is None:
            return None
        group, mixing = self._mixings[i].restored(row["blocks"], self._positions[i]), self._mixings[i]
        if group.block_length < mixing.block_length:
            until = "up to its epoch's end sequences are made of blocks of %d tokens, with which the epoch began"
            logger.warning(f"%s: {until}", row["prefix"], group.block_length)
        return group

    def begin_as_in(self, state: dict[str, Any]) -> None:
        """To the beginning of the run of which `state` is a later position: in the old order what it has read so."""
        self.rewind()
        old = {row["fingerprint"] for row in state["sources"] if row.get("blocks") is None}
        self._groups = [None if s.dataset.fingerprint in old else group for s, group in zip(self.sources, self._groups)]


def _rows_of_rank(global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Numbers in the global batch of a rank's sequences, int64 [num_micro_batches, micro_batch_size]."""
    return np.arange(global_batch_size).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]


def build_train_and_valid_streams(config: RunConfig) -> tuple[TrainingStream, TrainingStream | None]:
    """The streams that `config` asks for: --data-path cut by --split, or --train-data-path and --valid-data-path.

    No validation stream where --eval-iters is 0, where the split's second share is, or where only --train-data-path is given.
    Raises UserError for whatever is wrong with the flags or the datasets.
    """
    data = config.data
    if bool(data.data_path) == bool(data.train_data_path):
        given = "both of them" if data.data_path else "neither of them"
        raise UserError(f"give the data by --data-path or by --train-data-path; {given} was given")
    if data.valid_data_path and data.data_path:
        raise UserError("--valid-data-path goes with --train-data-path; --data-path takes its validation documents by --split")

    datasets: list[IndexedDataset] = []

    def build(entries: list[str], flag: str, split: str | None, part: int) -> TrainingStream:
        prefixes, weights = parse_data_path(entries, flag)
        vocab_size, seed = config.model.vocab_size, config.training.seed
        sources, integers = open_sources(prefixes, weights, vocab_size, seed, data.data_cache_path, split, part)
        datasets.extend(source.dataset for source in sources)
        check_same_tokenizer(datasets, data.tokenizer_model)
        return TrainingStream(sources, integers, vocab_size, seed, data.seq_length, data.reset_position_ids, data.loss_across_documents)

    if data.train_data_path:
        train = build(data.train_data_path, "--train-data-path", None, 0)
        wanted = data.valid_data_path and config.training.eval_iters
        return train, build(data.valid_data_path, "--valid-data-path", None, 1) if wanted else None
    train = build(data.data_path, "--data-path", data.split, 0)
    wanted = config.training.eval_iters and split_shares(data.split)[1]
    return train, build(data.data_path, "--data-path", data.split, 1) if wanted else None


def whole_batch(batches: Sequence[Batch]) -> Batch:
    """The global batch from the batches of all data-parallel ranks in their order: what one rank alone would get.

    Returns arrays [num_micro_batches * dp_size, micro_batch_size, seq_length].
    """
    return merge_batches(batches, lambda arrays: np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:]))


def merge_batches(batches: Sequence[Batch], merge: Callable[[list[np.ndarray]], np.ndarray]) -> Batch:
    """One batch of several, field by field; a field that the batches leave out (None) is left out."""
    fields = zip(*batches, strict=True)
    return Batch(*(None if arrays[0] is None else merge(list(arrays)) for arrays in fields))


def batch_hash(batch: Batch) -> str:
    """Names a batch's content and order, and not how it is cut into micro-batches: equal under every layout."""
    digest = hashlib.sha256()
    for array in filter(lambda array: array is not None, batch):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
