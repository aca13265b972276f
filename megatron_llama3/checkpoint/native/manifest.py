"""`manifest.json` of a native checkpoint: every file with its size and CRC-32, written before the checkpoint has its name.

    {"files": {".metadata": {"bytes": 5120, "crc32": "0a1b2c3d"}, "__0_0.distcp": {..., "parts": "0:1b2c3d4e 4608:2c3d4e5f"}, ...}}

`parts` has for each tensor of a file the byte where it begins and its CRC-32: text, as 405B on 16,384 ranks has millions of them.

A start looks at names, sizes and the small files (`damage`); what is then read is held to `parts` (checksums.py);
`tools/inspect_checkpoint.py --verify` reads every byte (`damaged_files`).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from zlib_ng.zlib_ng import crc32, crc32_combine

from megatron_llama3.checkpoint.native.folder import CONFIG_FILE, STATE_FILE, TOKENIZER_FOLDER, read_train_state
from megatron_llama3.checkpoint.native.metadata import METADATA_FILE, stored_tensors
from megatron_llama3.config.command_line import load_run_config
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import is_passing, is_there, user_error
from megatron_llama3.training.progress import moved

MANIFEST_FILE = "manifest.json"
SMALL_FILES = (METADATA_FILE, CONFIG_FILE, STATE_FILE)
BLOCK_BYTES = 8 << 20


def entry(crcs: Mapping[int, int], size: int) -> dict:
    """A file's entry from the CRC-32 of its parts, by where each begins; the first begins at 0 and the last ends at `size`."""
    starts = [*sorted(crcs), size]
    whole = 0
    for start, end in pairwise(starts):
        whole = crc32_combine(whole, crcs[start], end - start)
    found = {"bytes": size, "crc32": f"{whole:08x}"}
    return found | ({"parts": " ".join(f"{start}:{crcs[start]:08x}" for start in starts[:-1])} if len(crcs) > 1 else {})


def parts(entry: Mapping) -> dict[int, int]:
    """Where each tensor of a file begins -> its CRC-32; empty for a file of one, and where an older version wrote the manifest."""
    pairs = (pair.split(":") for pair in entry.get("parts", "").split())
    return {int(start): int(crc, 16) for start, crc in pairs}


def summarize(path: Path, starts: Sequence[int] = ()) -> dict:
    """A file's entry: {"bytes": its size, "crc32": eight hexadecimal digits}, and "parts" where several begin at `starts`."""
    size = path.stat().st_size
    edges = [*sorted({0, *starts}), size]
    return entry({start: crc_of_part(path, start, end - start) for start, end in pairwise(edges)}, size)


def crc_of_part(path: Path, offset: int, length: int) -> int:
    """Of the bytes that are there, if they are fewer."""
    crc, block = 0, memoryview(bytearray(min(BLOCK_BYTES, length)))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while length and (count := file.readinto(block[: min(length, len(block))])):
            crc, length = crc32(block[:count], crc), length - count
            moved(count)
    return crc


def write_manifest(folder: Path, files: dict[str, dict]) -> None:
    """Writes the entries of the tensor files, and adds those of the small files, which are in `folder`."""
    entries = files | {name: summarize(folder / name) for name in SMALL_FILES}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": dict(sorted(entries.items()))}, indent=0) + "\n")


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """File name -> {"bytes", "crc32"}; None where an older version wrote none. Raises UserError for one that is damaged."""
    path = folder / MANIFEST_FILE
    if not is_there(path):
        return None
    try:
        files = json.loads(path.read_bytes())["files"]
        if set(SMALL_FILES) <= files.keys() and all(_is_sound(name, entry) for name, entry in files.items()):
            return files
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        pass
    raise UserError(f"{path}: damaged: no table of files with bytes and crc32")


def _is_sound(name: str, entry: Mapping) -> bool:
    """Also raises what malformed numbers raise."""
    is_text = re.fullmatch(r"(\d{1,15}:[0-9a-f]{8}( |$))*", entry.get("parts", "")) is not None
    return _is_inside(name) and int(entry["crc32"], 16) >= 0 and int(entry["bytes"]) >= 0 and is_text


def _is_inside(name: str) -> bool:
    """Whether a file's name stays in the checkpoint's folder: no absolute path, no way up."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be loaded, or None. Cheap: names, sizes, and the content of the small files.

    Raises StorageError where the file system fails in a way that may pass: that says nothing about the checkpoint."""
    try:
        if not is_there(folder):
            return f"{folder}: the folder is missing"
        files = read_manifest(folder)
        if files is not None:
            _check_no_others(folder, files)
        else:
            files = _files_in_metadata(folder)
        for name, entry in files.items():
            _check_size(folder / name, entry)
        for name in SMALL_FILES:
            if "crc32" in files.get(name, {}) and summarize(folder / name) != files[name]:
                return f"{folder / name}: its bytes are not those that were saved ({MANIFEST_FILE})"
        load_run_config(str(folder / CONFIG_FILE))
        read_train_state(folder)
    except (UserError, OSError) as error:
        if is_passing(error):
            raise user_error(error) from error
        return str(error).splitlines()[0]
    return None


def damaged_files(folder: Path) -> Iterator[str]:
    """A line for each file that is not what the manifest says. Reads every byte."""
    files = read_manifest(folder)
    if files is None:
        return
    try:
        _check_no_others(folder, files)
    except UserError as error:
        yield str(error)
    for name, entry in files.items():
        try:
            _check_size(folder / name, entry)
        except UserError as error:
            yield str(error)
            continue
        if summarize(folder / name)["crc32"] != entry["crc32"]:
            yield f"{folder / name}: its bytes are not those that were saved (CRC-32)"


def _check_no_others(folder: Path, files: Mapping[str, dict]) -> None:
    """Raises UserError for a tensor or tokenizer file that the manifest does not have: two checkpoints were mixed."""
    kept = folder / TOKENIZER_FOLDER
    found = [*folder.glob("*.distcp"), *(kept.iterdir() if any(name.startswith(f"{TOKENIZER_FOLDER}/") for name in files) else ())]
    others = sorted(str(path.relative_to(folder)) for path in found if str(path.relative_to(folder)) not in files)
    if others:
        raise UserError(f"{folder / others[0]}: {MANIFEST_FILE} does not have this file: remove it, or take another checkpoint")


def _check_size(path: Path, entry: dict) -> None:
    if not is_there(path):
        raise UserError(f"{path}: the file is missing")
    size = path.stat().st_size
    if size < entry["bytes"] or (size > entry["bytes"] and "crc32" in entry):
        raise UserError(f"{path}: has {size:,} bytes, {entry['bytes']:,} were saved")


def _files_in_metadata(folder: Path) -> dict[str, dict]:
    """Without a manifest: where the last tensor of each file ends."""
    ends: dict[str, int] = {}
    for tensor in stored_tensors(folder).values():
        for chunk in tensor.chunks:
            ends[chunk.path.name] = max(ends.get(chunk.path.name, 0), chunk.offset + chunk.length)
    return {name: {"bytes": end} for name, end in ends.items()}
