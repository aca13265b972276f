"""What --input means: nothing is left out without a word, a pipe is read once, a file is read once."""

import os

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.preprocess_inputs import expand_inputs, left_out


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jsonl", "B.JSONL", "c.jsonlines", "part-00001", "d.jsonl.bz2", ".hidden"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "f.jsonl").symlink_to("/nowhere")
    return tmp_path


def test_what_a_folder_leaves_out_is_counted_by_kind(folder):
    assert [os.path.basename(source.path) for source in expand_inputs([str(folder)])] == ["B.JSONL", "a.jsonl"]
    (line,) = left_out([str(folder)])
    assert line.startswith(f"--input {folder}: left out 5 of its files: ")
    for kind in ("1 .jsonlines", "1 without extension", "1 .jsonl.bz2", "1 hidden", "1 broken link"):
        assert kind in line
    (folder / "whole").mkdir()
    (folder / "whole" / "a.txt").write_text("a")
    assert left_out([str(folder / "whole"), str(folder / "a.jsonl")]) == []


def test_a_file_that_is_there_twice_is_refused_whatever_it_is_called(folder):
    (folder / "link.jsonl").symlink_to("a.jsonl")
    for again in ("a.jsonl", "link.jsonl", "../" + folder.name + "/a.jsonl"):
        with pytest.raises(UserError, match="the same file as"):
            expand_inputs([str(folder / "a.jsonl"), str(folder / again)])


def test_a_pipe_is_standard_input(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "dup2", lambda opened, standard: opened_as.append(standard))
    opened_as: list[int] = []
    os.close(writing)
    (source,) = expand_inputs([f"/dev/fd/{reading}"])
    assert (source.path, source.kind, opened_as) == ("-", "jsonl", [0])
    with pytest.raises(UserError, match="cannot be mixed"):
        expand_inputs([f"/dev/fd/{reading}", "-"])
