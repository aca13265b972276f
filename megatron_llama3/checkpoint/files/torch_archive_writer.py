"""torch.save's container written tensor by tensor: a zip of stored members, `data.pkl` beside one member a storage (torch_archive.py
reads it). Python's zipfile would do, but its CRC-32 takes longer than writing the bytes."""

import collections
import io
import pickle
import struct
from collections.abc import Iterable, Mapping
from math import prod
from typing import BinaryIO

import torch

from megatron_llama3.checkpoint.files.file_writer import FileWriter
from megatron_llama3.checkpoint.files.torch_archive import STORAGES, contiguous_stride
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, tensor_bytes

_ALIGNMENT = 64
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
# Zip's record fields: version 4.5 (zip64), sizes follow in a zip64 field, the CRC follows the data, and the date is zip's first, so that
# equal weights make equal files.
_VERSION, _IN_ZIP64, _CRC_FOLLOWS, _DATE = 45, 0xFFFFFFFF, 8, 33


def write_archive(file: FileWriter, tensors: Mapping[str, LazyTensor] | LazyTensor) -> None:
    """Writes what `torch.save` of the dict (or of the one tensor) would hold at the file's position, one block of rows at a time."""
    entries = [tensors] if isinstance(tensors, LazyTensor) else list(tensors.values())
    archive = _Zip(file)
    archive.add("data.pkl", [_pickle(tensors)])
    archive.add("byteorder", [b"little"])
    for key, tensor in enumerate(entries):
        archive.add(f"data/{key}", map(tensor_bytes, tensor.blocks()))
    archive.add("version", [b"3\n"])
    archive.finish()


class _Zip:
    """A zip that starts at the file's position; its offsets count from there."""

    def __init__(self, file: FileWriter):
        self.file, self.start, self.directory = file, file.position, []

    def add(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        path, offset = f"archive/{name}".encode(), self.file.position - self.start
        padding = -(offset + 30 + len(path) + 20 + 4) % _ALIGNMENT  # torch maps storages in place, so they start aligned
        extra = struct.pack("<HHQQ", 1, 16, 0, 0) + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fields = (_VERSION, _CRC_FOLLOWS, 0, 0, _DATE, 0, _IN_ZIP64, _IN_ZIP64, len(path), len(extra))
        self.file.write([struct.pack("<4s5H3I2H", b"PK\3\4", *fields), path, extra])
        size, crc = self.file.write(pieces)
        self.file.write([struct.pack("<4sIQQ", b"PK\7\x08", crc, size, size)])
        fields = (_VERSION, _VERSION, _CRC_FOLLOWS, 0, 0, _DATE, crc, _IN_ZIP64, _IN_ZIP64, len(path), 28, 0, 0, 0, 0, _IN_ZIP64)
        entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields)
        self.directory.append(entry + path + struct.pack("<HHQQQ", 1, 24, size, size, offset))

    def finish(self) -> None:
        offset = self.file.position - self.start
        size, _ = self.file.write(self.directory)
        end, count = offset + size, len(self.directory)
        self.file.write(
            [
                struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, count, count, size, offset),
                struct.pack("<4sIQI", b"PK\6\7", 0, end, 1),
                struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), _IN_ZIP64, _IN_ZIP64, 0),
            ]
        )


def _pickle(tensors: Mapping[str, LazyTensor] | LazyTensor) -> bytes:
    """data.pkl: tensors as torch pickles them, each a storage of its own that is named by number."""
    buffer = io.BytesIO()
    pickler = _TensorPickler(buffer)
    pickler.dump(tensors if isinstance(tensors, LazyTensor) else dict(tensors))
    return buffer.getvalue()


class _StorageToken:
    def __init__(self, key: int, tensor: LazyTensor):
        self.key, self.tensor = key, tensor


class _TensorPickler(pickle.Pickler):
    """Protocol 2, as torch.save: a LazyTensor becomes the call that rebuilds a tensor, its storage a persistent id."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, protocol=2)
        self._count = 0

    def persistent_id(self, obj):
        if not isinstance(obj, _StorageToken):
            return None
        storage = getattr(torch, _STORAGE_NAMES[obj.tensor.dtype])
        return ("storage", storage, str(obj.key), "cpu", prod(obj.tensor.shape))

    def reducer_override(self, obj):
        if not isinstance(obj, LazyTensor):
            return NotImplemented
        token = _StorageToken(self._count, obj)
        self._count += 1
        return torch._utils._rebuild_tensor_v2, (token, 0, obj.shape, contiguous_stride(obj.shape), False, collections.OrderedDict())
