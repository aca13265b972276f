"""Native checkpoints read and written by one process without process groups, tensor by tensor.

Training saves and loads the same files through torch.distributed.checkpoint (checkpoint/store.py); here only a block of rows is held.
"""

import json
import math
import mmap
from functools import partial
from pathlib import Path

import torch

from megatron_llama3.checkpoint.files.file_writer import FileWriter
from megatron_llama3.checkpoint.files.foreign_config import read_json
from megatron_llama3.checkpoint.files.publish import write_in_parallel
from megatron_llama3.checkpoint.files.torch_archive import read_archive
from megatron_llama3.checkpoint.files.torch_archive_writer import write_archive
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, OptimizerState, WeightSource, cast, map_file, without_leading
from megatron_llama3.checkpoint.names import check_weights, weight_shapes
from megatron_llama3.checkpoint.native.checksums import Checksums
from megatron_llama3.checkpoint.native.folder import (
    CONFIG_FILE,
    COUNTS,
    LATEST_FILE,
    STATE_FILE,
    TOKENIZER_FOLDER,
    WITHOUT_DATA,
    read_train_state,
    resolve_native,
)
from megatron_llama3.checkpoint.native.manifest import damaged_files, entry, summarize, write_manifest
from megatron_llama3.checkpoint.native.metadata import StoredChunk, StoredTensor, stored_tensors, write_metadata
from megatron_llama3.checkpoint.tokenizer_files import tokenizer_assets, write_tokenizer
from megatron_llama3.config.command_line import load_run_config, resolved_yaml
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig

MODEL_PREFIX = "model."
MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 5_000_000_000


def open_native(path: str | Path, checksums: bool = True, with_optimizer: bool = False) -> WeightSource:
    """The model weights of a native checkpoint, still on disk, and Adam's state `with_optimizer`; with `checksums` each part is held to
    the manifest before it is read for the first time.

    Raises UserError for a missing or truncated file, a poisoned pickle, or weights that do not fit the run config.
    """
    folder = resolve_native(path)
    config = load_run_config(folder / CONFIG_FILE)
    stored = open_native_tensors(folder, MODEL_PREFIX, checksums)
    tensors = {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in stored.items()}
    shapes = weight_shapes(config.model, len(tensors), folder / CONFIG_FILE)
    check_weights({name: tensor.shape for name, tensor in tensors.items()}, shapes, folder)
    kept = folder / TOKENIZER_FOLDER
    generation = kept / "generation_config.json"
    return WeightSource(
        config.model,
        {name: tensors[name] for name in shapes},
        tokenizer_assets(kept) if kept.is_dir() else _tokenizer_of_run(config),
        read_json(generation) if generation.is_file() else {},
        optimizer=_open_optimizer(folder, config, shapes, checksums) if with_optimizer else None,
    )


def _open_optimizer(folder: Path, config: RunConfig, shapes: dict[str, tuple[int, ...]], checksums: bool) -> OptimizerState:
    """Raises UserError where there is none, as in a checkpoint that was converted from weights alone."""
    moments = {}
    for moment in MOMENTS:
        prefix = f"optimizer.{moment}."
        tensors = {key.removeprefix(prefix): tensor for key, tensor in open_native_tensors(folder, prefix, checksums).items()}
        if not tensors:
            raise UserError(f"{folder}: holds no optimizer state: convert it without --with-optimizer")
        check_weights({name: tensor.shape for name, tensor in tensors.items()}, shapes, f"{folder}: {moment}")
        moments[moment] = {name: tensors[name] for name in shapes}
    state = read_train_state(folder)
    step = state["iteration"] - state.get("lost_updates", 0)
    return OptimizerState(**moments, step=step, run=config, **{name: state[name] for name in COUNTS})


def check_files(path: str | Path) -> None:
    """Holds every file of a native checkpoint to its manifest, reading every byte. Raises UserError for the first that differs."""
    for line in damaged_files(resolve_native(path)):
        raise UserError(f"{line}; take another checkpoint")


def _tokenizer_of_run(config: RunConfig) -> dict[str, bytes]:
    """The tokenizer that the run was trained with, where it still lies where the run config says."""
    path = config.data.tokenizer_model
    return tokenizer_assets(Path(path)) if path and Path(path).exists() else {}


def open_native_tensors(folder: Path, prefix: str = "", checksums: bool = True) -> dict[str, LazyTensor]:
    """Every tensor of one iteration whose DCP key starts with `prefix`, by that key."""
    return open_chunks(stored_tensors(folder, prefix), Checksums(folder) if checksums else None)


def open_chunks(stored_tensors: dict[str, StoredTensor], sums: Checksums | None = None) -> dict[str, LazyTensor]:
    """Tensors of torch.distributed.checkpoint's files, still on disk. Raises UserError for a file that is missing or too short."""
    mappings: dict[Path, mmap.mmap] = {}
    tensors = {}
    for key, stored in stored_tensors.items():
        chunks = []
        for chunk in stored.chunks:
            if chunk.path not in mappings:
                if not chunk.path.is_file():
                    raise UserError(f"{chunk.path}: the file is missing")
                mappings[chunk.path] = map_file(chunk.path)
            end, size = chunk.offset + chunk.length, len(mappings[chunk.path])
            if end > size:
                raise UserError(f"{chunk.path}: truncated: {key} ends at byte {end}, the file has {size}")
            chunks.append(_Chunk(mappings[chunk.path], chunk, stored.dtype, sums))
        tensors[key] = _assemble(stored, chunks)
    return tensors


def write_native(source: WeightSource, save: Path, dtype: torch.dtype | None = None, workers: int | None = None) -> None:
    """Writes `save`/iter_0000000 and `save`/latest_checkpointed_iteration.txt in place: weights, config, a train state of iteration 0;
    of a source with an optimizer its state too, under the iteration that it had come to."""
    state = source.optimizer
    counts = {name: 0 if state is None else getattr(state, name) for name in COUNTS}
    folder = save / f"iter_{counts['iteration']:07d}"
    folder.mkdir()
    tensors = {MODEL_PREFIX + name: cast(tensor, dtype) for name, tensor in source.weights.items()}
    for moment in MOMENTS if state is not None else ():
        tensors |= {f"optimizer.{moment}.{name}": tensor for name, tensor in getattr(state, moment).items()}
    files = _files(tensors)
    chunks: dict[str, tuple] = {}
    summaries: dict[str, dict] = {}
    tasks = [partial(_write_file, folder, f"__{i}_0.distcp", tensors, chunks, summaries) for i, tensors in enumerate(files)]
    write_in_parallel(tasks, workers)
    write_metadata(folder, {key: chunks[key] for tensors in files for key in tensors})
    (folder / CONFIG_FILE).write_text(resolved_yaml(RunConfig(model=source.model) if state is None else state.run))
    more = {} if state is None else {"lost_updates": state.iteration - state.step, WITHOUT_DATA: True}
    (folder / STATE_FILE).write_text(json.dumps(counts | more) + "\n")
    kept = folder / TOKENIZER_FOLDER
    kept.mkdir()
    (kept / "generation_config.json").write_text(json.dumps(write_tokenizer(source, kept, "any"), indent=2) + "\n")
    write_manifest(folder, summaries | {f"{TOKENIZER_FOLDER}/{path.name}": summarize(path) for path in kept.iterdir()})
    (save / LATEST_FILE).write_text(str(counts["iteration"]))


def _write_file(folder: Path, name: str, tensors: dict[str, LazyTensor], chunks: dict[str, tuple], summaries: dict[str, dict]) -> None:
    """One .distcp file: for each tensor what torch.save writes, back to back. Notes each one's place, and the file's manifest entry."""
    crcs = {}
    with FileWriter(folder / name) as file:
        for key, tensor in tensors.items():
            offset, file.crc = file.position, 0
            write_archive(file, tensor)
            chunks[key] = (tensor.dtype, tensor.shape, name, offset, file.position - offset)
            crcs[offset] = file.crc
        summaries[name] = entry(crcs, file.position)


def _files(tensors: dict[str, LazyTensor]) -> list[dict[str, LazyTensor]]:
    """Tensors over at least four files (threads write one each), of at most about FILE_BYTES."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    count = max(min(4, len(tensors)), math.ceil(total / FILE_BYTES))
    files: list[dict[str, LazyTensor]] = [{} for _ in range(count)]
    written = 0
    for key, tensor in tensors.items():
        files[min(count - 1, written * count // max(1, total))][key] = tensor
        written += tensor.nbytes
    return [file for file in files if file]


class _Chunk:
    """One stored chunk, whose zip is parsed on first use: 405B has thousands."""

    def __init__(self, mapping: mmap.mmap, place: StoredChunk, dtype: torch.dtype, checksums: Checksums | None):
        self.place = place
        self._mapping, self._dtype, self._checksums = mapping, dtype, checksums
        self._tensor: LazyTensor | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Raises UserError where the bytes are not those that were saved, or not the tensor that `.metadata` announces."""
        place = self.place
        if self._tensor is None:
            if self._checksums is not None:
                self._checksums.check(place.path.name, place.offset, place.length)
            content = read_archive(self._mapping, place.path, place.offset, place.length)
            shape = place.stored_sizes or place.sizes
            if not isinstance(content, LazyTensor) or content.shape != shape or content.dtype != self._dtype:
                found = f"{list(content.shape)} {content.dtype}" if isinstance(content, LazyTensor) else "no tensor"
                raise UserError(f"{place.path}: byte {place.offset} has {found}, .metadata says {list(shape)} {self._dtype}")
            self._tensor = content if place.stored_sizes is None else without_leading(content, place.sizes)
        return self._tensor.rows(start, stop)


def _assemble(stored: StoredTensor, chunks: list[_Chunk]) -> LazyTensor:
    """A tensor from its chunks, which any layout may have cut along any dimensions."""

    def rows(start: int, stop: int) -> torch.Tensor:
        if len(chunks) == 1:
            return chunks[0].rows(start, stop)
        whole = torch.empty(stop - start, *stored.shape[1:], dtype=stored.dtype)
        for chunk in chunks:
            offsets, sizes = chunk.place.offsets, chunk.place.sizes
            low, high = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if low < high:
                others = (slice(offset, offset + size) for offset, size in zip(offsets[1:], sizes[1:]))
                whole[(slice(low - start, high - start), *others)] = chunk.rows(low - offsets[0], high - offsets[0])
        return whole

    return LazyTensor(stored.shape, stored.dtype, rows)
