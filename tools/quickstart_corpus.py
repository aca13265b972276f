"""Real text that every machine with Python has: the standard library's own source, every 16th file held out.

    python tools/quickstart_corpus.py --output runs/quickstart/corpus

Writes train.jsonl and held_out.jsonl, each line a file with "text" and "path". Left out are tests, which not every machine has, and
character tables and the texts of `help()`: they are easier than code, or other, and one part would have more of them than the other.
"""

import argparse
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "entities.py"}
HELD_OUT_EVERY = 16


def source_files(library: Path) -> Iterator[tuple[str, str]]:
    """(path below the library, text) of every module, in order of path."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if LEFT_OUT.isdisjoint(relative.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield str(relative), text


def split(files: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held out): every 16th file in order of size, so that both have small and large ones alike."""
    by_size = sorted(files, key=lambda file: (len(file[1]), file[0]))
    held_out = by_size[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return [file for file in files if file not in held_out], held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--library", type=Path, default=stdlib, help="folder of the source (default: this Python's)")
    args = parser.parse_args()
    files = list(source_files(args.library))
    parts = dict(zip(("train", "held_out"), split(files)))
    if not all(parts.values()):
        raise UserError(f"--library {args.library}: {len(files)} Python files, too few to train on some and hold out others")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        aside = args.output / f".{name}.jsonl"
        lines = [json.dumps({"text": text, "path": path}) + "\n" for path, text in part]
        aside.write_text("".join(lines))
        os.replace(aside, args.output / f"{name}.jsonl")
        characters = sum(len(text) for _, text in part)
        print(f"{args.output / name}.jsonl: {len(part)} files, {characters / 1e6:.1f} M characters")


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
