"""Real text that every machine with Python has: the standard library's own source, some files held out.

    python tools/quickstart_corpus.py --output runs/quickstart/corpus

Writes train.jsonl and held_out.jsonl, each line with "text" and "path". Tests are left out: not every machine has them. Files are cut, at
blank lines where there are any, into documents of about a sequence: whole files would fill a small run's batches with one file each.
"""

import argparse
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
HELD_OUT_SHARE = 1 / 16
DOCUMENT_CHARACTERS = 1600


def source_files(library: Path) -> Iterator[tuple[str, str]]:
    """(path below the library, text) of every module, in order of path."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if LEFT_OUT.isdisjoint(relative.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield str(relative), text


def documents_of(text: str) -> Iterator[str]:
    """Pieces that end at a blank line after DOCUMENT_CHARACTERS, at the latest with a line after twice as many; joined, the text."""
    start = 0
    while start < len(text):
        blank = text.find("\n\n", start + DOCUMENT_CHARACTERS, start + 2 * DOCUMENT_CHARACTERS)
        border = blank + 1 if blank >= 0 else text.find("\n", start + 2 * DOCUMENT_CHARACTERS)
        end = len(text) if border < 0 else border + 1
        yield text[start:end]
        start = end


def is_held_out(path: str) -> bool:
    """A function of the path alone, so that a second run holds out the same files."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little") < HELD_OUT_SHARE * 2**32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--library", type=Path, default=stdlib, help="folder of the source (default: this Python's)")
    args = parser.parse_args()
    documents = list(source_files(args.library))
    parts = {"train": [d for d in documents if not is_held_out(d[0])], "held_out": [d for d in documents if is_held_out(d[0])]}
    if not all(parts.values()):
        raise UserError(f"--library {args.library}: {len(documents)} Python files, too few to train on some and hold out others")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        aside = args.output / f".{name}.jsonl"
        lines = [json.dumps({"text": document, "path": path}) + "\n" for path, text in part for document in documents_of(text)]
        aside.write_text("".join(lines))
        os.replace(aside, args.output / f"{name}.jsonl")
        characters = sum(len(text) for _, text in part)
        print(f"{args.output / name}.jsonl: {len(lines):,} documents of {len(part)} files, {characters / 1e6:.1f} M characters")


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
