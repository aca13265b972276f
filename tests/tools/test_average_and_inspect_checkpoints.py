"""Averages and comparisons of small native checkpoints, through the command line."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_llama3.checkpoint.lazy_tensor import WeightSource, from_tensor
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.initial_weights import initial_weight
from megatron_llama3.model.sharding import weight_table

MODEL = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=50)
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    made = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("checkpoint")
        weights = {name: from_tensor(initial_weight(name, spec, seed)) for name, spec in weight_table(MODEL).items()}
        write_native(WeightSource(MODEL, weights), folder)
        made.append(folder)
    return made


def tool(name: str, *arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, TOOLS / name, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "shares"), [((), (1 / 3, 1 / 3, 1 / 3)), (("--exponential-decay", 0.5), (0.25, 0.25, 0.5))])
def test_average(folders, tmp_path, flags, shares):
    done = tool("average_checkpoints.py", "--load", *folders, "--save", tmp_path / "mean", *flags)
    assert done.returncode == 0, done.stderr
    ours, sources = open_native(tmp_path / "mean"), [open_native(folder) for folder in folders]
    for name, tensor in ours.weights.items():
        expected = sum(share * source.weights[name].read().double() for share, source in zip(shares, sources, strict=True))
        assert torch.equal(tensor.read(), expected.float())


def test_average_refuses(folders, tmp_path):
    for arguments, message in [
        (["--load", folders[0]], "at least two"),
        (["--load", *folders, "--exponential-decay", "1.5"], "must lie between 0 and 1"),
        (["--load", folders[0], tmp_path], "no native checkpoint"),
    ]:
        done = tool("average_checkpoints.py", *arguments, "--save", tmp_path / "mean")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
        assert not (tmp_path / "mean").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("average_checkpoints.py",), ("convert_checkpoint.py", "--from", "native", "--to", "hf")])
def test_a_flipped_bit_is_refused(folders, tmp_path, flags):
    shutil.copytree(folders[0] / "iter_0000000", tmp_path / "x")
    file = max((tmp_path / "x").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    sources = [tmp_path / "x"] if "--from" in flags else [folders[1], tmp_path / "x"]
    done = tool(*flags, "--load", *sources, "--save", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{file}: its bytes are not those that were saved" in done.stderr
    assert not (tmp_path / "out").exists()
    assert tool(*flags, "--load", *sources, "--save", tmp_path / "out", "--no-verify").returncode == 0


@pytest.mark.slow
def test_inspect(folders):
    shown = tool("inspect_checkpoint.py", folders[0], "--verify")
    assert shown.returncode == 0, shown.stderr
    assert "model.layers.0.attention.wq.weight" in shown.stdout
    assert "whole: every tensor" in shown.stdout
    assert tool("inspect_checkpoint.py", folders[0], "--diff", folders[0]).stdout == "no difference\n"
    different = tool("inspect_checkpoint.py", folders[0], "--diff", folders[1])
    assert different.returncode == 1
    assert "model.output.weight: 800 of 800 values differ" in different.stdout
    assert "norm.weight" not in different.stdout


def test_inspect_finds_damage(folders, tmp_path):
    """A file that is cut, and one flipped bit in the middle of a weight, are named by file; nothing else is said."""
    shutil.copytree(folders[2] / "iter_0000000", tmp_path / "x")
    file = max((tmp_path / "x").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    middle = len(content) // 2
    for harmed, reason in [
        (content[:middle], f"has {middle:,} bytes, {len(content):,} were saved"),
        (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], "its bytes are not those that were saved (CRC-32)"),
    ]:
        file.write_bytes(harmed)
        done = tool("inspect_checkpoint.py", tmp_path / "x", "--verify")
        assert (done.returncode, done.stdout, done.stderr) == (1, f"{file}: {reason}\n", "")


@pytest.mark.slow
def test_inspect_compares_values_and_configs(folders, tmp_path):
    source = open_native(folders[0])
    changed = source.weights["norm.weight"].read().clone()
    changed[3] += 0.5
    weights = source.weights | {"norm.weight": from_tensor(changed)}
    (tmp_path / "x").mkdir()
    write_native(WeightSource(replace(MODEL, rotary_base=7), weights), tmp_path / "x")
    done = tool("inspect_checkpoint.py", folders[0], "--diff", tmp_path / "x")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "model.rotary_base: 500000 | 7",
        "model.norm.weight: 1 of 16 values differ, by up to 0.5 (0.125 of the tensor's norm)",
    ]
