"""The corpus: held-out files apart and drawn alike, the same on a second run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.quickstart_corpus import split

TOOL = Path(__file__).parents[2] / "tools" / "quickstart_corpus.py"


def test_both_parts_are_drawn_alike():
    """Of files of any sizes every 16th goes to the held-out part, from the smallest to the largest."""
    files = [(f"{size}.py", "x" * size) for size in range(1, 1601)]
    train, held_out = split(files)
    assert sorted(train + held_out) == sorted(files)
    assert len(held_out) == 100
    means = [sum(len(text) for _, text in part) / len(part) for part in (train, held_out)]
    assert means[0] == pytest.approx(means[1], rel=0.01)


def _library(folder: Path) -> Path:
    library = folder / "library"
    for i in range(200):
        path = library / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"value = {i}\n")
    for name in ("test/test_it.py", "encodings/cp1.py", "html/entities.py"):
        (library / name).parent.mkdir()
        (library / name).write_text("tests = 'left out'\n")
    (library / "package0" / "empty.py").write_text("\n")
    return library


def _run(library: Path, output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOL, "--library", library, "--output", output]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_file_is_on_one_side(tmp_path):
    library = _library(tmp_path)
    assert _run(library, tmp_path / "a").returncode == 0
    rows = {name: [json.loads(line) for line in (tmp_path / "a" / f"{name}.jsonl").open()] for name in ("train", "held_out")}
    assert sorted(row["text"] for side in rows.values() for row in side) == sorted(f"value = {i}\n" for i in range(200))
    assert len(rows["held_out"]) == 12
    assert _run(library, tmp_path / "b").returncode == 0
    for name in rows:
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()


def test_no_files_is_one_line(tmp_path):
    result = _run(tmp_path, tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr == f"error: --library {tmp_path}: 0 Python files, too few to train on some and hold out others\n"
