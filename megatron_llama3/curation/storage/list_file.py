"""Word and domain lists from files: one entry a line, `#` starts a comment, gzip by name."""

import gzip
from collections.abc import Iterable
from pathlib import Path

from megatron_llama3.config.errors import UserError


def read_list(path: str | Path, argument: str) -> list[str]:
    """The entries, lower-cased, in the file's order. Raises UserError, naming `argument`, where the file is missing or empty."""
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = [line.split("#", 1)[0].strip().lower() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{argument} {path}: cannot be read ({error}); give a text file with one entry a line") from error
    entries = [line for line in lines if line]
    if not entries:
        raise UserError(f"{argument} {path}: holds no entries; give one a line")
    return entries


def read_lists(paths: str | Iterable[str], argument: str) -> list[str]:
    """All entries of one file or several."""
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise UserError(f"{argument}: names no file; give one with one entry a line")
    return [entry for path in paths for entry in read_list(path, argument)]
