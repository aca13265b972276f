"""The corpus: nothing lost in cutting, held-out files apart, the same on a second run."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tools.quickstart_corpus import DOCUMENT_CHARACTERS, documents_of, is_held_out

TOOL = Path(__file__).parents[2] / "tools" / "quickstart_corpus.py"


@given(st.lists(st.integers(0, 3000), max_size=8), st.sampled_from(["\n", "\n\n"]))
def test_documents_are_the_text(lengths, between):
    text = between.join("x" * length for length in lengths)
    documents = list(documents_of(text))
    assert "".join(documents) == text
    for document in documents[:-1]:
        assert document.endswith("\n")
        assert DOCUMENT_CHARACTERS < len(document) <= 2 * DOCUMENT_CHARACTERS + 3001
        assert document.endswith("\n\n") or "\n\n" not in document[DOCUMENT_CHARACTERS : 2 * DOCUMENT_CHARACTERS]


def _library(folder: Path) -> Path:
    library = folder / "library"
    for i in range(200):
        path = library / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"value = {i}\n")
    (library / "test").mkdir()
    (library / "test" / "test_it.py").write_text("tests = 'left out'\n")
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
    assert all(is_held_out(row["path"]) == (name == "held_out") for name, side in rows.items() for row in side)
    assert 3 < len(rows["held_out"]) < 30
    assert _run(library, tmp_path / "b").returncode == 0
    for name in rows:
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()


def test_no_files_is_one_line(tmp_path):
    result = _run(tmp_path, tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr == f"error: --library {tmp_path}: 0 Python files, too few to train on some and hold out others\n"
