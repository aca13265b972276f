"""The `.metadata` file of torch.distributed.checkpoint: which tensors there are and in which file and byte range each chunk lies.

It is a pickle. `read_metadata` admits only the types that describe tensors; `SafeFileSystemReader` gives dcp.load the same protection.
"""

import bisect
import pathlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata

from megatron_llama3.checkpoint.files.opaque import OthersOpaque
from megatron_llama3.checkpoint.files.torch_archive import unpickle
from megatron_llama3.checkpoint.native.counted_files import CountedFiles
from megatron_llama3.config.errors import UserError

METADATA_FILE = ".metadata"
_MOST_PARTS = 64

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_CLASSES = {
    metadata: ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
               "StorageMeta", "_MEM_FORMAT_ENCODING"),
    filesystem: ("_StorageInfo",),
}  # fmt: skip
_ALLOWED = {(module.__name__, name): getattr(module, name) for module, names in _CLASSES.items() for name in names}
_ALLOWED |= {("torch", name): getattr(torch, name) for name in _DTYPES}
_ALLOWED[("torch", "Size")] = lambda sizes: torch.Size(_few(sizes))
_ALLOWED[("torch.serialization", "_get_layout")] = lambda name: {"torch.strided": torch.strided}[name]
# Where the checkpoint was written; only the text matters, and pathlib moved the classes after Python 3.12.
_PATHS = [(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")]
_ALLOWED |= dict.fromkeys(_PATHS, lambda *parts: pathlib.PurePosixPath(*_few(parts)))


def _few(values: tuple) -> tuple:
    """Raises ValueError for more than dimensions or parts of a path: a few bytes of a pickle could copy a long tuple many times."""
    if len(values) > _MOST_PARTS:
        raise ValueError(f"{len(values)} dimensions, or parts of a path")
    return values


def read_metadata(folder: Path, others_opaque: bool = False) -> metadata.Metadata:
    """The checkpoint's table of contents. Raises UserError if it is missing, damaged, or asks for any other type; with `others_opaque`
    values of other types are passed over, as Megatron-LM keeps plans of saving in it."""
    path = Path(folder) / METADATA_FILE
    if not path.is_file():
        raise UserError(f"{path}: the file is missing; {folder} is no complete native checkpoint")
    content = unpickle(path.read_bytes(), OthersOpaque(_ALLOWED) if others_opaque else _ALLOWED, path)
    if not isinstance(content, metadata.Metadata):
        raise UserError(f"{path}: holds no checkpoint metadata")
    return content


@dataclass(frozen=True)
class StoredChunk:
    """A rectangle of a tensor, and the file and bytes that hold it as torch.save wrote it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    offset: int
    length: int
    stored_sizes: tuple[int, ...] | None = None
    """its shape in the file where that has more dimensions, of size 1, than the tensor"""


@dataclass(frozen=True)
class StoredTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[StoredChunk]


def stored_tensors(folder: Path, prefix: str = "") -> dict[str, StoredTensor]:
    """Every tensor whose key starts with `prefix`, checked: chunks lie within it and cover it.

    Raises UserError as `read_metadata` does, and for a table of contents that contradicts itself or leaves the folder.
    """
    tensors = tensors_in(read_metadata(folder), folder, prefix)
    for key, tensor in tensors.items():
        check_cover(key, tensor, folder)
    return tensors


def tensors_in(content: metadata.Metadata, folder: Path, prefix: str = "") -> dict[str, StoredTensor]:
    """Every tensor whose key starts with `prefix`; its chunks lie within it and the folder, but need not cover it."""
    try:
        places = {(index.fqn, tuple(index.offset or ())): info for index, info in content.storage_data.items()}
        return {
            key: _stored_tensor(key, entry, places, Path(folder))
            for key, entry in content.state_dict_metadata.items()
            if key.startswith(prefix) and not isinstance(entry, metadata.BytesStorageMetadata)
        }
    except (AttributeError, TypeError, ValueError) as error:  # fields missing or of other types
        raise UserError(f"{folder}/{METADATA_FILE}: damaged ({error})") from None


def _stored_tensor(key: str, entry: metadata.TensorStorageMetadata, places: dict, folder: Path) -> StoredTensor:
    shape, chunks = tuple(entry.size), []
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        info = places.get((key, offsets))
        if info is None or Path(info.relative_path).name != info.relative_path or info.offset < 0 or info.length < 0:
            raise UserError(f"{folder}: {METADATA_FILE} has no place in this folder for {key} at {list(offsets)}")
        if any(not 0 <= start <= start + size <= whole for start, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise UserError(f"{folder}: a chunk of {key} at {list(offsets)} of {list(sizes)} leaves its shape {list(shape)}")
        chunks.append(StoredChunk(offsets, sizes, folder / info.relative_path, info.offset, info.length))
    if not isinstance(entry.properties.dtype, torch.dtype):
        raise UserError(f"{folder}: {METADATA_FILE} has no dtype for {key}")
    return StoredTensor(entry.properties.dtype, shape, chunks)


def check_cover(key: str, tensor: StoredTensor, folder: Path) -> None:
    """Raises UserError unless the chunks of a tensor fill it, each element once."""
    shape, chunks = tensor.shape, tensor.chunks
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise UserError(f"{folder}: the chunks of {key} do not cover its shape {list(shape)}")
    if any(chunk.sizes[2:] != shape[2:] for chunk in chunks):
        raise UserError(f"{folder}: {key} is cut along more than two dimensions")
    if overlap([(chunk.offsets, chunk.sizes) for chunk in chunks]):
        raise UserError(f"{folder}: chunks of {key} overlap, so that they do not cover its shape {list(shape)}")


def overlap(chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether two of these (offsets, sizes) share an element, looking at two dimensions, in n log n steps: rows are swept over, and the
    chunks at a row kept in order of columns."""
    edges = []
    for offsets, sizes in chunks:
        (row, column), (rows, columns) = (*offsets, 0, 0)[:2], (*sizes, 1, 1)[:2]
        if rows and columns:
            edges += [(row, True, column, column + columns), (row + rows, False, column, column + columns)]
    here: list[tuple[int, int]] = []
    for _, begins, *span in sorted(edges):  # at a row, those that end come first
        place = bisect.bisect_left(here, tuple(span))
        if not begins:
            del here[place]
            continue
        if (place and here[place - 1][1] > span[0]) or (place < len(here) and here[place][0] < span[1]):
            return True
        here.insert(place, tuple(span))
    return False


def write_metadata(folder: Path, chunks: dict[str, tuple[torch.dtype, tuple[int, ...], str, int, int]]) -> None:
    """Writes `.metadata` for whole tensors: key -> (dtype, shape, file name, offset, length)."""
    (Path(folder) / METADATA_FILE).write_bytes(pickle.dumps(whole_tensors(chunks)))


def whole_tensors(chunks: dict[str, tuple[torch.dtype, tuple[int, ...], str, int, int]]) -> metadata.Metadata:
    """The table of contents of tensors that are one chunk each; arguments as for `write_metadata`."""
    tensors, storage = {}, {}
    for key, (dtype, shape, file, offset, length) in chunks.items():
        size, origin = torch.Size(shape), torch.Size([0] * len(shape))
        properties = metadata.TensorProperties(dtype=dtype)
        tensors[key] = metadata.TensorStorageMetadata(properties, size, [metadata.ChunkStorageMetadata(origin, size)])
        storage[metadata.MetadataIndex(key, origin, 0)] = filesystem._StorageInfo(file, offset, length)
    # `planner_data` maps a flat key to its path in the state dict; ours are flat, so each is its own path.
    return metadata.Metadata(tensors, {key: (key,) for key in tensors}, storage, version="1.0.0")


class SafeFileSystemReader(FileSystemReader):
    """torch's reader with `.metadata` read by `read_metadata`: pass it to dcp.load as `storage_reader`.

    Its `read_metadata` raises UserError for an entry that is no tensor, which dcp.load would unpickle without restriction, and for a file
    outside the folder. What it gave once it gives again: dcp.load takes a second attempt that succeeds for the sign of another format, on
    that rank alone, and hangs.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.fs = CountedFiles()
        self.content: metadata.Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        if self.content is None:
            self.content = self._checked()
        return self.content

    def _checked(self) -> metadata.Metadata:
        content = read_metadata(Path(self.path))
        for key, entry in content.state_dict_metadata.items():
            if not isinstance(entry, metadata.TensorStorageMetadata):
                raise UserError(f"{self.path}/{METADATA_FILE}: {key} is stored as a pickle, not as a tensor; loading it could run code")
        for index, place in content.storage_data.items():
            if Path(place.relative_path).name != place.relative_path:
                raise UserError(f"{self.path}/{METADATA_FILE}: {index.fqn} would be read from {place.relative_path!r}, outside the folder")
        content.storage_meta = content.storage_meta or metadata.StorageMeta()
        content.storage_meta.load_id = self.load_id
        return content
