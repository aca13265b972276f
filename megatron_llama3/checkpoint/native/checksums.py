"""What is read of a native checkpoint is held to its manifest, part by part: a rank that loads a share of it checks that share.

A manifest that an older version wrote has no checksums of parts; then each file is checked whole, the first time that something is read
from it. A checkpoint without a manifest is read as it is.
"""

from pathlib import Path

from megatron_llama3.checkpoint.native.manifest import MANIFEST_FILE, crc_of_part, parts, read_manifest
from megatron_llama3.checkpoint.native.metadata import METADATA_FILE
from megatron_llama3.config.errors import UserError

ADVICE = "copy the checkpoint again, or take another one"


class DamagedCheckpointError(UserError):
    """What is to be loaded is not what was saved."""


class Checksums:
    """Of the checkpoint in `folder`. Raises UserError for a manifest that is damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = read_manifest(folder)
        self._parts: dict[str, dict[int, int]] = {}
        self._checked: set[tuple[str, int]] = set()

    def check(self, name: str, offset: int, length: int) -> None:
        """Reads these bytes of a file, once, in blocks. Raises DamagedCheckpointError where they are not those that were saved, and for a
        file that the manifest does not have."""
        if self._files is None:
            return
        path = self.folder / name
        if name not in self._files:
            raise DamagedCheckpointError(f"{path}: {METADATA_FILE} has tensors in it, and {MANIFEST_FILE} does not have the file; {ADVICE}")
        if name not in self._parts:
            self._parts[name] = parts(self._files[name])
        expected = self._parts[name].get(offset)
        if expected is None:
            offset, length, expected = 0, self._files[name]["bytes"], int(self._files[name]["crc32"], 16)
        if (name, offset) not in self._checked and crc_of_part(path, offset, length) != expected:
            where = f"{path}: bytes {offset:,} to {offset + length:,}"
            raise DamagedCheckpointError(f"{where} are not those that were saved (CRC-32); {ADVICE}")
        self._checked.add((name, offset))
