"""Native checkpoints read and written by one process without process groups, tensor by tensor.

Training saves and loads the same files through torch.distributed.checkpoint (checkpoint/store.py); here only a block of rows is held.
"""

import json
import math
from functools import partial
from pathlib import Path

import torch

from megatron_llama3.checkpoint.lazy import LazyTensor, WeightSource, cast, map_file
from megatron_llama3.checkpoint.names import check_weights
from megatron_llama3.checkpoint.native_metadata import read_metadata, write_metadata
from megatron_llama3.checkpoint.publish import write_in_parallel
from megatron_llama3.checkpoint.tokenizer_files import tokenizer_assets, write_tokenizer
from megatron_llama3.checkpoint.torch_archive import read_archive, write_archive
from megatron_llama3.config.command_line import load_run_config, resolved_yaml
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.model.sharding import weight_table

LATEST_FILE = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "run_config.yaml"
STATE_FILE = "train_state.json"
TOKENIZER_FOLDER = "tokenizer"  # tokenizer files and generation_config.json that came with converted weights
MODEL_PREFIX = "model."
FILE_BYTES = 5_000_000_000


def resolve_native(path: str | Path) -> Path:
    """The folder of one iteration: `path` itself, or the one that `latest_checkpointed_iteration.txt` names. Raises UserError."""
    path = Path(path)
    latest = path / LATEST_FILE
    if not latest.is_file():
        if not (path / ".metadata").is_file():
            raise UserError(f"{path}: no native checkpoint (neither {LATEST_FILE} nor .metadata is there)")
        return path
    text = latest.read_text().strip()
    if not text.isdecimal():
        raise UserError(f"{latest}: {text[:40]!r} is not an iteration number")
    folder = path / f"iter_{int(text):07d}"
    if not folder.is_dir():
        raise UserError(f"{latest}: names iteration {text}, but {folder} is missing")
    return folder


def open_native(path: str | Path) -> WeightSource:
    """The model weights of a native checkpoint (optimiser state is left alone), still on disk.

    Raises UserError for a missing or truncated file, a poisoned pickle, or weights that do not fit the run config.
    """
    folder = resolve_native(path)
    config = load_run_config(folder / CONFIG_FILE)
    tensors = {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in open_native_tensors(folder, MODEL_PREFIX).items()}
    shapes = {name: spec.shape for name, spec in weight_table(config.model).items()}
    check_weights({name: tensor.shape for name, tensor in tensors.items()}, shapes, folder)
    kept = folder / TOKENIZER_FOLDER
    generation = kept / "generation_config.json"
    return WeightSource(
        config.model,
        {name: tensors[name] for name in shapes},
        tokenizer_assets(kept) if kept.is_dir() else {},
        json.loads(generation.read_bytes()) if generation.is_file() else {},
    )


def open_native_tensors(folder: Path, prefix: str = "") -> dict[str, LazyTensor]:
    """Every tensor of one iteration whose DCP key starts with `prefix`, by that key."""
    metadata = read_metadata(folder)
    positions = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    mappings: dict[str, object] = {}
    tensors = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith(prefix) or not hasattr(entry, "chunks"):
            continue
        chunks = []
        for chunk in entry.chunks:
            info = positions.get((key, tuple(chunk.offsets)))
            if info is None or Path(info.relative_path).name != info.relative_path:
                raise UserError(f"{folder}: .metadata has no place for {key} at {list(chunk.offsets)}")
            path = folder / info.relative_path
            if not path.is_file():
                raise UserError(f"{path}: the file is missing")
            if path.name not in mappings:
                mappings[path.name] = map_file(path)
            end, size = info.offset + info.length, len(mappings[path.name])
            if end > size:
                raise UserError(f"{path}: truncated: {key} ends at byte {end}, the file has {size}")
            chunks.append((tuple(chunk.offsets), tuple(chunk.sizes), _OnDemand(mappings[path.name], path, info.offset, info.length)))
        tensors[key] = _assemble(key, tuple(entry.size), entry.properties.dtype, chunks, folder)
    return tensors


def write_native(source: WeightSource, save: Path, dtype: torch.dtype | None = None, workers: int | None = None) -> None:
    """Writes `save`/iter_0000000 and `save`/latest_checkpointed_iteration.txt in place: weights, config, a train state of iteration 0."""
    folder = save / "iter_0000000"
    folder.mkdir()
    files = _files({MODEL_PREFIX + name: cast(tensor, dtype) for name, tensor in source.weights.items()})
    chunks: dict[str, tuple] = {}
    write_in_parallel([partial(_write_file, folder, f"__{i}_0.distcp", tensors, chunks) for i, tensors in enumerate(files)], workers)
    write_metadata(folder, {key: chunks[key] for tensors in files for key in tensors})
    (folder / CONFIG_FILE).write_text(resolved_yaml(RunConfig(model=source.model)))
    (folder / STATE_FILE).write_text(json.dumps({"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0}) + "\n")
    kept = folder / TOKENIZER_FOLDER
    kept.mkdir()
    (kept / "generation_config.json").write_text(json.dumps(write_tokenizer(source, kept, "any"), indent=2) + "\n")
    (save / LATEST_FILE).write_text("0")


def _write_file(folder: Path, name: str, tensors: dict[str, LazyTensor], chunks: dict[str, tuple]) -> None:
    """One .distcp file: for each tensor what torch.save writes, back to back. Adds each one's place to `chunks`."""
    with open(folder / name, "wb") as file:
        for key, tensor in tensors.items():
            offset = file.tell()
            write_archive(file, tensor)
            chunks[key] = (tensor.dtype, tensor.shape, name, offset, file.tell() - offset)


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


class _OnDemand:
    """One stored chunk, whose zip is parsed on first use: 405B has thousands."""

    def __init__(self, mapping, path: Path, offset: int, length: int):
        self._mapping, self._path, self._offset, self._length = mapping, path, offset, length
        self._tensor: LazyTensor | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor().rows(start, stop)

    def tensor(self) -> LazyTensor:
        if self._tensor is None:
            content = read_archive(self._mapping, self._path, self._offset, self._length)
            if not isinstance(content, LazyTensor):
                raise UserError(f"{self._path}: no tensor at byte {self._offset}")
            self._tensor = content
        return self._tensor


def _assemble(key: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: list, folder: Path) -> LazyTensor:
    """A tensor from its chunks, which any layout may have cut along any dimensions. Raises UserError where they do not cover it."""
    if sum(math.prod(sizes) for _, sizes, _ in chunks) != math.prod(shape):
        raise UserError(f"{folder}: the chunks of {key} do not cover its shape {list(shape)}")

    def rows(start: int, stop: int) -> torch.Tensor:
        first = chunks[0]
        if len(chunks) == 1:
            return _checked(first[2], first[1], dtype, key, folder).rows(start, stop)
        whole = torch.empty(stop - start, *shape[1:], dtype=dtype)
        for offsets, sizes, stored in chunks:
            low, high = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if low < high:
                place = (slice(low - start, high - start), *(slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:])))
                whole[place] = _checked(stored, sizes, dtype, key, folder).rows(low - offsets[0], high - offsets[0])
        return whole

    return LazyTensor(shape, dtype, rows)


def _checked(stored: _OnDemand, sizes: tuple[int, ...], dtype: torch.dtype, key: str, folder: Path) -> LazyTensor:
    tensor = stored.tensor()
    if tensor.shape != sizes or tensor.dtype != dtype:
        raise UserError(f"{folder}: {key} is stored as {list(tensor.shape)} {tensor.dtype}, .metadata says {list(sizes)} {dtype}")
    return tensor
