"""`manifest.json` of a native checkpoint: every file with its size and CRC-32, written before the checkpoint has its name.

    {"files": {".metadata": {"bytes": 5120, "crc32": "0a1b2c3d"}, "__0_0.distcp": {...}, ...}}

A start looks at names, sizes and the small files (`damage`); `tools/inspect_checkpoint.py --verify` reads every byte (`damaged_files`).
"""

import json
from collections.abc import Iterator
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from megatron_llama3.checkpoint.native.folder import CONFIG_FILE, STATE_FILE, read_train_state
from megatron_llama3.checkpoint.native.metadata import METADATA_FILE, stored_tensors
from megatron_llama3.config.command_line import load_run_config
from megatron_llama3.config.errors import UserError

MANIFEST_FILE = "manifest.json"
SMALL_FILES = (METADATA_FILE, CONFIG_FILE, STATE_FILE)
BLOCK_BYTES = 8 << 20


def entry(size: int, crc: int) -> dict:
    return {"bytes": size, "crc32": f"{crc:08x}"}


def summarize(path: Path) -> dict:
    """A file's entry: {"bytes": its size, "crc32": eight hexadecimal digits}."""
    size, crc = 0, 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            size, crc = size + len(block), crc32(block, crc)
    return entry(size, crc)


def write_manifest(folder: Path, files: dict[str, dict]) -> None:
    """Writes the entries of the tensor files, and adds those of the small files, which are in `folder`."""
    entries = files | {name: summarize(folder / name) for name in SMALL_FILES}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": dict(sorted(entries.items()))}, indent=0) + "\n")


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """File name -> {"bytes", "crc32"}; None where an older version wrote none. Raises UserError for one that is damaged."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_bytes())["files"]
        sound = (_is_inside(name) and int(entry["crc32"], 16) >= 0 and int(entry["bytes"]) >= 0 for name, entry in files.items())
        if set(SMALL_FILES) <= files.keys() and all(sound):
            return files
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        pass
    raise UserError(f"{path}: damaged: no table of files with bytes and crc32")


def _is_inside(name: str) -> bool:
    """Whether a file's name stays in the checkpoint's folder: no absolute path, no way up."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be loaded, or None. Cheap: names, sizes, and the content of the small files."""
    if not folder.is_dir():
        return f"{folder}: the folder is missing"
    try:
        files = read_manifest(folder)
        if files is None:
            files = _files_in_metadata(folder)
        for name, entry in files.items():
            _check_size(folder / name, entry)
        for name in SMALL_FILES:
            if "crc32" in files.get(name, {}) and summarize(folder / name) != files[name]:
                return f"{folder / name}: its bytes are not those that were saved ({MANIFEST_FILE})"
        load_run_config(str(folder / CONFIG_FILE))
        read_train_state(folder)
    except (UserError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def damaged_files(folder: Path) -> Iterator[str]:
    """A line for each file that is not what the manifest says. Reads every byte."""
    for name, entry in (read_manifest(folder) or {}).items():
        try:
            _check_size(folder / name, entry)
        except UserError as error:
            yield str(error)
            continue
        if summarize(folder / name)["crc32"] != entry["crc32"]:
            yield f"{folder / name}: its bytes are not those that were saved (CRC-32)"


def _check_size(path: Path, entry: dict) -> None:
    if not path.is_file():
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
