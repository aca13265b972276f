"""torch.save's container read tensor by tensor: a zip of stored (uncompressed) members, `data.pkl` beside one member a storage.

Reading runs no code from the file: `data.pkl` goes through an unpickler that admits only the functions that rebuild a tensor.
"""

import collections
import io
import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from math import prod
from typing import BinaryIO

import torch

from megatron_llama3.checkpoint.files.opaque import OthersOpaque
from megatron_llama3.checkpoint.lazy_tensor import from_mapping
from megatron_llama3.config.errors import UserError

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that knows only the globals it is given and names any other in its error."""

    def __init__(self, file: BinaryIO, allowed: Mapping[tuple[str, str], object]):
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str):
        if (module, name) not in self._allowed:
            wanted = f"{module}.{name}".encode("unicode_escape").decode()  # what a damaged file says may break a line
            raise pickle.UnpicklingError(f"it asks for {wanted}, which a checkpoint has no use for; loading it could run code")
        return self._allowed[module, name]


def unpickle(data: bytes, allowed: Mapping[tuple[str, str], object], where: object, persistent_load=None):
    """The object in `data`. Raises UserError for any global not in `allowed` and for damaged data."""
    unpickler = RestrictedUnpickler(io.BytesIO(data), allowed)
    if persistent_load is not None:
        unpickler.persistent_load = persistent_load
    try:
        _check_memo(data)
        return unpickler.load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{where}: refused to unpickle: {error or type(error).__name__}") from None


def _check_memo(data: bytes) -> None:
    """Raises ValueError for lengths that leave the pickle, and for an index of its memo beyond its size: C's unpickler makes a table up to
    the largest index, tens of gigabytes for a pickle of eleven bytes."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and not 0 <= argument <= len(data):
            raise ValueError(f"its memo would have an entry {argument}")


def _empty_dict() -> collections.OrderedDict:
    """What pickles of state dicts begin with. It takes no argument: a few bytes could make a large copy of one."""
    return collections.OrderedDict()


def read_archive(
    mapping: mmap.mmap,
    where: object,
    start: int = 0,
    length: int | None = None,
    others: Mapping[tuple[str, str], object] | None = None,
) -> object:
    """What torch.save wrote into bytes [start, start+length) of a mapped file, with a LazyTensor in the place of each tensor.

    With `others`, classes that it has may be in it too, and any other becomes an Opaque (files/opaque.py).

    Raises UserError for a truncated file, a member that is compressed, and a pickle that asks for anything but tensors.
    """
    region = _Region(mapping, start, len(mapping) - start if length is None else length)
    try:
        members = {info.filename.split("/", 1)[-1]: info for info in zipfile.ZipFile(region).infolist()}
        pickled = _member_bytes(region, members["data.pkl"])
        order = _member_bytes(region, members["byteorder"]) if "byteorder" in members else b"little"
    except Exception:  # a damaged zip raises nearly anything
        raise UserError(f"{where}: truncated, or not a file that torch.save wrote") from None
    if order != b"little":
        raise UserError(f"{where}: written on a big-endian machine, or damaged")

    def storage(token: tuple) -> tuple[torch.dtype, int, int]:
        kind, dtype, key, _, elements = token
        info = members.get(f"data/{key}")
        if kind != "storage" or info is None or not 0 <= elements * dtype.itemsize <= info.file_size:
            raise ValueError(f"storage {key} is missing or shorter than the {elements} elements that it should hold")
        return dtype, start + _data_offset(region, info), elements

    def rebuild(source, offset, shape, stride, *_):
        dtype, position, elements = source
        inside = offset >= 0 and min(shape, default=0) >= 0 and offset + prod(shape) <= elements
        if not inside or (prod(shape) and tuple(stride) != contiguous_stride(shape)):
            raise ValueError(f"a tensor of shape {tuple(shape)}, stride {tuple(stride)} is not contiguous or leaves its storage")
        return from_mapping(mapping, position + offset * dtype.itemsize, tuple(shape), dtype)

    allowed = {("torch", name): dtype for name, dtype in STORAGES.items()}
    allowed[("torch._utils", "_rebuild_tensor_v2")] = rebuild
    allowed[("torch._utils", "_rebuild_parameter")] = lambda tensor, *_: tensor
    allowed[("collections", "OrderedDict")] = _empty_dict
    return unpickle(pickled, allowed if others is None else OthersOpaque(allowed | dict(others)), where, storage)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _data_offset(region: "_Region", info: zipfile.ZipInfo) -> int:
    """Where a member's bytes start: behind its local header, whose name and extra field have lengths of their own.

    Raises ValueError for a compressed member and for one that leaves the file.
    """
    region.seek(info.header_offset)
    header = region.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4" or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} has no local header, or is compressed")
    offset = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if offset + info.file_size > region.seek(0, io.SEEK_END):
        raise ValueError(f"{info.filename} leaves the file")
    return offset


def _member_bytes(region: "_Region", info: zipfile.ZipInfo) -> bytes:
    region.seek(_data_offset(region, info))
    return region.read(info.file_size)


class _Region(io.RawIOBase):
    """A part of a mapped file as a file of its own, for zipfile."""

    def __init__(self, mapping: mmap.mmap, start: int, length: int):
        self._mapping, self._start, self._length, self._position = mapping, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if self._position < 0:
            raise ValueError("seek before the start")
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        begin = self._start + self._position
        buffer[:count] = self._mapping[begin : begin + count]
        self._position += count
        return count
