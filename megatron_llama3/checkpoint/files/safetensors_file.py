"""safetensors files read and written tensor by tensor: an 8-byte header length, a JSON header, then the bytes of each tensor.

The safetensors package maps files privately (which counts as memory of the process) and writes from whole tensors; both matter at 405B.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path

import torch

from megatron_llama3.checkpoint.files.file_writer import FileWriter
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, from_mapping, map_file, tensor_bytes
from megatron_llama3.config.errors import UserError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
TASK_BYTES = 256 << 20
_MAX_HEADER_BYTES = 4 << 20  # an entry takes about 100 bytes, so 405B's 1,137 weights take a thirtieth; as objects it is 30 times as large


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Every floating-point tensor of the file by name. Raises UserError for a truncated or malformed file or a quantised dtype."""
    if not path.is_file():
        raise UserError(f"{path}: the file is missing")
    mapping = map_file(path)
    header, data_start = _header(path, mapping)
    tensors, ranges = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        code, shape, start, stop = _entry(entry, name, path)
        ranges.append((start, stop, name))
        if name.endswith("rotary_emb.inv_freq"):  # old exports store this constant
            continue
        if code not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {code}; only {', '.join(_DTYPES)} can be read (dequantise it first)")
        if stop - start != prod(shape) * _DTYPES[code].itemsize or not 0 <= start <= stop or min(shape, default=0) < 0:
            raise UserError(f"{path}: {name} {shape} {code} does not fit its byte range {start}..{stop}")
        if data_start + stop > len(mapping):
            raise UserError(f"{path}: truncated: {name} ends at byte {data_start + stop}, the file has {len(mapping)}")
        tensors[name] = from_mapping(mapping, data_start + start, shape, _DTYPES[code])
    _check_ranges(ranges, len(mapping) - data_start, path)
    return tensors


def _check_ranges(ranges: list[tuple[int, int, str]], size: int, path: Path) -> None:
    """Raises UserError unless the tensors fill the file's data, as the format wants it: no overlap, no hole, nothing behind the last."""
    ranges = sorted([(0, 0, "the header"), *ranges, (size, size, "the end of the file")])
    for (_, end, name), (start, _, other) in pairwise(ranges):
        if start < end:
            raise UserError(f"{path}: the byte ranges of {name} and {other} overlap")
        if start > end:
            raise UserError(f"{path}: {start - end} bytes between {name} and {other} belong to no tensor")


def writing_tasks(path: Path, tensors: Mapping[str, LazyTensor]) -> list[Callable[[], None]]:
    """Writes the header of a file with the tensors in the order given, and returns what is left to do: runs of tensors of about TASK_BYTES,
    in any order or at the same time, one block of rows each in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
    with FileWriter(path) as file:
        file.write([struct.pack("<Q", len(text)), text])
        start = file.position
    tasks, run, position = [], [], start
    for number, tensor in enumerate(tensors.values()):
        run.append(tensor)
        size = sum(t.nbytes for t in run)
        if size >= TASK_BYTES or number == len(tensors) - 1:
            tasks.append(partial(_write_run, path, position, run))
            run, position = [], position + size
    return tasks


def _write_run(path: Path, start: int, tensors: Sequence[LazyTensor]) -> None:
    with FileWriter(path, start) as file:
        for tensor in tensors:
            file.write(map(tensor_bytes, tensor.blocks()))


def _entry(entry: object, name: str, path: Path) -> tuple[str, list[int], int, int]:
    """(dtype's code, shape, first byte, byte behind the last) of a tensor, of the right types but not yet checked otherwise."""
    try:
        code, shape, (start, stop) = entry["dtype"], list(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        code, shape, start, stop = None, [], 0, 0
    if not isinstance(code, str) or any(type(number) is not int for number in (*shape, start, stop)):
        raise UserError(f"{path}: the entry of {name} in the header is malformed")
    return code, shape, start, stop


def _header(path: Path, mapping) -> tuple[dict, int]:
    length = struct.unpack("<Q", mapping[:8])[0] if len(mapping) >= 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise UserError(f"{path}: not a safetensors file (its header would have {length} bytes)")
    if 8 + length > len(mapping):
        raise UserError(f"{path}: truncated inside the header ({len(mapping)} bytes)")
    try:
        header = json.loads(mapping[8 : 8 + length])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file (its header is no JSON object)")
    return header, 8 + length
