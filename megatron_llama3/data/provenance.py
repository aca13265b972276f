"""From a training step back to its data: which documents each sequence held, and from where in which source file they came.

A run's order of data follows from its config, so the steps between the nearest checkpoint and the step in question are counted through
without reading a token.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_llama3.config.command_line import load_run_config
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import phase_at
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.loader import TrainingStream, build_train_and_valid_streams
from megatron_llama3.data.mixing import Stretch
from megatron_llama3.data.packing import PackedDocuments

# The names are those of checkpoint/native/folder.py, which comes after data in the order of imports.
_CONFIG_FILE, _STATE_FILE = "run_config.yaml", "train_state.json"


class SequencePlace(NamedTuple):
    """One sequence of a global batch: where it was trained on, how many tokens its dataset had given, and which of its stream it holds."""

    micro_batch: int
    dp_rank: int
    row: int
    source: PackedDocuments
    position: int
    stretches: list[Stretch]


class DocumentPiece(NamedTuple):
    """Tokens `start` to `start + length` of a document, and where the whole document came from: "FILE bytes 10 to 20", or "unknown"."""

    document: int
    start: int
    length: int
    document_length: int
    origin: str


def sequences_of_step(load: str | Path, step: int) -> list[SequencePlace]:
    """The sequences of the `step`-th optimizer step of a run, in the order of the global batch.

    load: a run_config.yaml, a checkpoint (iter_0000500), or a folder of checkpoints. Raises UserError if it does not lead to the step.
    """
    config, state, later = _nearest(Path(load), step)
    config.training.eval_iters = 0  # no validation stream
    stream, _ = build_train_and_valid_streams(config)
    iteration, tokens = 0, 0
    if state is not None:
        stream.load_state_dict(state["data"])
        iteration, tokens = state["iteration"], state["consumed_tokens"]
    elif later is not None and "data" in later:
        stream.begin_as_in(later["data"])
    for _ in range(iteration + 1, step):
        batch_size, seq_length = phase_at(config, tokens)
        stream.plan_batch(batch_size, seq_length)
        tokens += batch_size * seq_length
    return list(_places(stream, config, *phase_at(config, tokens)))


def _places(stream: TrainingStream, config: RunConfig, batch_size: int, seq_length: int) -> Iterator[SequencePlace]:
    rows, ranks = config.training.micro_batch_size, config.parallel.data_parallel_size
    plan = stream.plan_batch(batch_size, seq_length)
    for k, (source, position) in enumerate(zip(plan.sources, plan.positions)):
        at = (k // rows // ranks, k // rows % ranks, k % rows)
        yield SequencePlace(*at, stream.sources[source], int(position), stream.stretches(plan, k))


def _nearest(load: Path, step: int) -> tuple[RunConfig, dict | None, dict | None]:
    """The config of the run that made the step, the last state before it or None for the beginning, and the first state after it if any."""
    if step < 1:
        raise UserError(f"--step {step}: steps count from 1")
    if load.is_file():
        beside = load.with_name(_STATE_FILE)
        return load_run_config(load), None, json.loads(beside.read_text()) if beside.is_file() else None
    folders = [load] if (load / _STATE_FILE).is_file() else sorted(path.parent for path in load.glob(f"iter_*/{_STATE_FILE}"))
    if not folders:
        raise UserError(f"--load {load}: neither a run_config.yaml, nor a checkpoint, nor a folder of checkpoints (iter_*)")
    states = {path: json.loads((path / _STATE_FILE).read_text()) for path in folders}
    before = [path for path in folders if states[path]["iteration"] < step]
    after = [path for path in folders if states[path]["iteration"] >= step]
    config = load_run_config((after or before[-1:])[0] / _CONFIG_FILE)
    if not before and config.checkpoint.load and not config.checkpoint.finetune and Path(config.checkpoint.load) != load:
        raise UserError(f"--step {step} lies before {after[0]}, and the run went on from {config.checkpoint.load}: give that to --load")
    return config, states[before[-1]] if before else None, states[after[0]] if after else None


def pieces(place: SequencePlace) -> list[DocumentPiece]:
    """The documents in a sequence, in their order."""
    dataset = place.source.dataset
    return [
        DocumentPiece(int(document), int(start), int(length), int(dataset.document_lengths[document]), origin_text(dataset, int(document)))
        for stretch in place.stretches
        for document, start, length in zip(*place.source.spans(*stretch))
    ]


def origin_text(dataset: IndexedDataset, document: int) -> str:
    """ "corpus/a.jsonl bytes 10 to 20", or "unknown source" where preprocessing did not record it."""
    if dataset.origins is None or dataset.sidecar is None:
        return "unknown source"
    number, start, stop = dataset.origins[document].tolist()
    if number < 0:
        return "unknown source"
    source = dataset.sidecar["sources"][number]
    return f"{source['path']} {source['unit']} {start} to {stop}"
