"""tools/merge_datasets.py against megatron-core's own concatenation, killed in mid-way, and on inputs that do not fit together."""

import os
import signal
import sys

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_llama3.config.errors import exit_on_user_error
from megatron_llama3.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from tests.data.datasets import random_documents, write_dataset
from tools import merge_datasets


def merge(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["merge_datasets.py", *map(str, arguments)])
    exit_on_user_error(merge_datasets.main)


@pytest.fixture
def shards(tmp_path):
    """Three datasets in a folder; one of Megatron's with documents of several sequences and none, and no sidecar."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_dataset(folder / "a", random_documents(40, seed=1), np.uint16)
    builder = IndexedDatasetBuilder(str(folder / "b.bin"), np.uint16)
    for lengths in ([3, 4], [], [5]):
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(str(folder / "b.idx"))
    with IndexedDatasetWriter(folder / "c", np.uint16) as writer:
        writer.add_documents(np.arange(18), [5, 13], [[0, 10, 20], [1, 0, 30]])
        writer.add_document(np.arange(2))
        sources = [{"path": "x", "unit": "bytes"}, {"path": "y", "unit": "rows"}]
        writer.finalize({"job": {"--tokenizer-model": "t", "--shard-id": 3}}, sources)
    return folder


def test_the_bytes_are_megatrons(tmp_path, shards, monkeypatch, capsys):
    merge(monkeypatch, "--input", shards, "--output-prefix", tmp_path / "out" / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16)
    for name in "abc":
        builder.add_index(str(shards / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for part in ("bin", "idx"):
        assert (tmp_path / "out" / f"ours.{part}").read_bytes() == (tmp_path / f"theirs.{part}").read_bytes()
    assert "46 documents" in capsys.readouterr().out


def test_sources_and_notes_come_along(tmp_path, shards, monkeypatch):
    merge(monkeypatch, "--input", shards / "c", shards / "a", shards / "c", "--output-prefix", tmp_path / "ours")
    merged = IndexedDataset(tmp_path / "ours")
    assert merged.largest_id == max(map(max, map(merged.document, np.flatnonzero(merged.document_lengths))))
    assert merged.origins[:2].tolist() == [[0, 10, 20], [1, 0, 30]]
    assert merged.origins[2:43].tolist() == [[-1, 0, 0]] * 41
    assert merged.origins[43:].tolist() == [[2, 10, 20], [3, 0, 30], [-1, 0, 0]]
    assert [source["path"] for source in merged.sidecar["sources"]] == ["x", "y", "x", "y"]
    assert merged.sidecar["metadata"] == {"job": {"--tokenizer-model": "t"}, "merged_from": ["c", "a", "c"]}


def test_killed_in_mid_way_it_leaves_no_output_and_runs_again(tmp_path, shards, monkeypatch):
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(IndexedDatasetWriter, "finalize", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        merge(monkeypatch, "--input", shards, "--output-prefix", tmp_path / "out")
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert all(path.suffix == ".partial" for path in tmp_path.glob("out*"))
    merge(monkeypatch, "--input", shards, "--output-prefix", tmp_path / "out")
    assert IndexedDataset(tmp_path / "out").num_documents == 46
    assert not list(tmp_path.glob("*.partial"))


def _break_bits(shards):
    data = bytearray((shards / "a.bin").read_bytes())
    data[77] ^= 4
    (shards / "a.bin").write_bytes(data)


def _other_tokenizer(shards):
    with IndexedDatasetWriter(shards / "d", np.uint16) as writer:
        writer.finalize({"job": {"--tokenizer-model": "u"}})


@pytest.mark.parametrize(
    "prepare, inputs, message",
    [
        (_break_bits, ["."], "checksums differ"),
        (_other_tokenizer, ["."], "made with tokenizer u"),
        (lambda shards: write_dataset(shards / "d", [np.arange(3)], np.int32), ["."], "holds int32"),
        (lambda shards: os.unlink(shards / "b.bin"), ["."], "b.bin: no such file"),
        (lambda shards: os.truncate(shards / "b.idx", 50), ["."], "where its header"),
        (lambda shards: None, ["nothing"], "no such file"),
        (lambda shards: (shards / "empty").mkdir(), ["empty"], "holds no .bin and .idx files"),
    ],
)
def test_what_cannot_be_merged_is_one_line_and_no_output(tmp_path, shards, monkeypatch, capsys, prepare, inputs, message):
    prepare(shards)
    with pytest.raises(SystemExit) as stopped:
        merge(monkeypatch, "--input", *[shards / name for name in inputs], "--output-prefix", tmp_path / "out")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("out*"))


def test_an_output_among_the_inputs_is_refused(shards, monkeypatch, capsys):
    before = (shards / "a.bin").read_bytes()
    with pytest.raises(SystemExit):
        merge(monkeypatch, "--input", shards, "--output-prefix", shards / "a")
    assert "one of the inputs" in capsys.readouterr().err
    assert (shards / "a.bin").read_bytes() == before
