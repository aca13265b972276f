"""tools/inspect_dataset.py: what it prints is what is there, and --verify finds what has changed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_llama3.config.command_line import resolved_yaml
from megatron_llama3.config.errors import exit_on_user_error
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.indexed_dataset import IndexedDatasetWriter
from tests.data.datasets import random_documents
from tools import inspect_dataset


@pytest.fixture
def prefix(tmp_path):
    documents = random_documents(60, 1, high=250)
    documents[7] = np.frombuffer(b"From the seventh document", dtype=np.uint8)
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents(np.concatenate(documents), [len(d) for d in documents], [[0, 10 * i, 10 * i + 9] for i in range(60)])
        writer.finalize({"tokenizer": "bytes"}, [{"path": "corpus.jsonl", "unit": "bytes"}])
    return tmp_path / "a"


@pytest.fixture
def byte_tokenizer(tmp_path):
    """A vocabulary of the 256 bytes, in order."""
    from megatron_llama3.tokenizer.llama3 import Tokenizer

    Tokenizer({bytes([i]): i for i in range(256)}).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def inspect(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        monkeypatch.setattr(sys, "argv", ["inspect_dataset.py", *map(str, arguments)])
        code = 0
        try:
            exit_on_user_error(inspect_dataset.main)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def test_counts_and_documents(prefix, inspect):
    code, out, _ = inspect(prefix, "--documents", 7, "--samples", 2)
    assert code == 0
    assert "documents    60" in out
    assert "dtype        uint16" in out
    assert "largest id   249\n" in out
    assert "document 7, 25 tokens, corpus.jsonl bytes 70 to 79\n  70 114 111 109" in out
    assert [line.split(",")[0] for line in out.splitlines() if line.startswith("document ")] == ["document 7", "document 15", "document 45"]


def test_it_starts_without_torch(prefix):
    """Importing torch and megatron-core takes many seconds: a tool over files must not."""
    command = [sys.executable, "-X", "importtime", inspect_dataset.__file__, str(prefix)]
    root = str(Path(inspect_dataset.__file__).parents[1])
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, check=True)
    assert "documents    60" in result.stdout
    assert "numpy" in result.stderr
    assert "torch" not in result.stderr


def test_text_with_a_tokenizer(prefix, byte_tokenizer, inspect):
    _, out, _ = inspect(prefix, "--documents", 7, "--tokenizer-model", byte_tokenizer, "--characters", 16)
    assert "  'From the seventh' ..." in out


def test_a_tokenizer_that_is_too_small_is_named(prefix, byte_tokenizer, inspect, tmp_path):
    with IndexedDatasetWriter(tmp_path / "b", np.uint16) as writer:
        writer.add_document(np.array([600]))
        writer.finalize()
    code, _, err = inspect(tmp_path / "b", "--samples", 1, "--tokenizer-model", byte_tokenizer)
    assert code == 2
    assert "holds id 600" in err


def test_histogram_is_a_picture(prefix, inspect, tmp_path):
    code, _, _ = inspect(prefix, "--histogram", tmp_path / "lengths.png")
    assert code == 0
    from matplotlib import pyplot

    picture = pyplot.imread(tmp_path / "lengths.png")
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 3


def test_verify_accepts_what_was_written(prefix, inspect):
    code, out, _ = inspect(prefix, "--verify")
    assert code == 0
    assert out.count("checksums agree") == 3


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["bin", "idx", "sources.npy"])
@pytest.mark.parametrize("damage", ["flip first", "flip last", "truncate", "remove"])
def test_verify_finds_damage(prefix, inspect, part, damage):
    path = prefix.with_name(f"a.{part}")
    if damage == "remove":
        os.unlink(path)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    else:
        _flip(path, 0 if damage == "flip first" else -1)
    code, out, err = inspect(prefix, "--verify")
    assert code == 2
    assert f"a.{part}" in out
    assert "1 of 3 files are damaged" in err
    assert err.count("\n") == 1


def test_verify_without_checksums_says_so(prefix, inspect):
    os.unlink(f"{prefix}.json")
    code, _, err = inspect(prefix, "--verify")
    assert code == 2
    assert "no checksums" in err


def test_a_step_is_traced_to_bytes_and_text(prefix, byte_tokenizer, inspect, tmp_path):
    config = RunConfig()
    config.data.train_data_path, config.data.seq_length = [str(prefix)], 40
    config.training.global_batch_size, config.parallel.world_size = 4, 2
    (tmp_path / "run_config.yaml").write_text(resolved_yaml(config))
    code, out, _ = inspect("--load", tmp_path / "run_config.yaml", "--step", 3, "--tokenizer-model", byte_tokenizer)
    assert code == 0
    assert out.count("step 3, sequence") == 4
    assert "step 3, sequence 3 (micro-batch 1, dp rank 1, row 0): 40 tokens" in out
    assert "corpus.jsonl bytes " in out
    _, one_rank, _ = inspect("--load", tmp_path / "run_config.yaml", "--step", 3, "--dp-rank", 1)
    assert one_rank.count("step 3, sequence") == 2
    flags = ["--load", tmp_path / "run_config.yaml", "--tokenizer-model", byte_tokenizer]
    assert any("From the seventh document" in inspect(*flags, "--step", step)[1] for step in range(1, 9))


@pytest.mark.parametrize("arguments", [[], ["a", "--step", "3", "--load", "x"], ["--step", "3"], ["a", "--load", "x"]])
def test_flags_that_do_not_go_together(inspect, arguments):
    assert inspect(*arguments)[0] == 2
