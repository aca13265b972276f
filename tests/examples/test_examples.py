"""Each example's dry run against golden text, and how scripts/launch.sh starts it.

After a change on purpose: UPDATE_GOLDEN=1 python -m pytest tests/examples, then read the diff.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"

RUNS = [
    ("pretrain_llama3_8b", 8),
    ("pretrain_llama3_8b", 1024),
    ("pretrain_llama3_8b", 16384),
    ("pretrain_llama3_70b", 2048),
    ("pretrain_llama3_405b", 8192),
    ("pretrain_llama3_405b", 16384),
    ("pretrain_llama3_405b_128k", 16384),
]


def run(*argv: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    }
    return subprocess.run(
        ["bash", *argv], cwd=cwd, env={**kept, "PYTHON": sys.executable, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def no_torch(tmp_path) -> str:
    """A folder for PYTHONPATH in which importing torch fails."""
    (tmp_path / "torch.py").write_text("raise ImportError('a dry run imported torch')\n")
    return str(tmp_path)


@pytest.mark.parametrize(("example", "world_size"), RUNS)
def test_dry_run(example, world_size, no_torch, tmp_path):
    done = run(str(ROOT / f"examples/{example}.sh"), "--dry-run", "--world-size", str(world_size), cwd=tmp_path, PYTHONPATH=no_torch)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    golden = GOLDEN / f"{example}_{world_size}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(done.stdout)
    assert done.stdout == golden.read_text()


def test_paper_layouts():
    """Table 4: data-parallel degree, sequences on each DP rank, and tokens a step of the three rows."""
    for name, dp, sequences in (("405b_8192", 64, 32), ("405b_16384", 128, 16), ("405b_128k_16384", 8, 16)):
        text = (GOLDEN / f"pretrain_llama3_{name}.txt").read_text()
        assert f"PP 16 x DP {dp}," in text
        assert f"= 16,777,216 tokens a step; {sequences} micro-batches of 1 on each of {dp} DP ranks" in text
        assert "128 chunks: embedding, 126 x 1 layer, output" in text


def test_later_flags_win():
    done = run("examples/pretrain_llama3_8b.sh", "--dry-run", "--world-size", "8", "--model-name", "llama3.2-1b", "--no-compile-blocks")
    assert done.stdout.startswith("model      llama3.2-1b: 1,235,814,400")
    assert "compiled" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world-size", "1000"], "error: world size 1000 is not divisible by TP x PP x CP = 8 x 16 x 1 = 128\n"),
        (["--world-size", "16384", "--tensor-model-paralel-size", "4"], "--tensor-model-parallel-size?\n"),
        (["--world-size", "16384", "--micro-batch-size", "3"], "error: global batch size 1024 is not divisible by micro-batch x DP"),
    ],
)
def test_refused_dry_run(flags, message, no_torch):
    done = run("examples/pretrain_llama3_405b.sh", "--dry-run", *flags, PYTHONPATH=no_torch)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_is_refused_before_torch(no_torch, tmp_path):
    prefix = str(tmp_path / "text")
    tokenizer = f"{prefix}.model"
    paths = {"DATA_PATH": f"1.0 {prefix}", "TOKENIZER_MODEL": tokenizer, "PYTHONPATH": no_torch}
    done = run("examples/pretrain_llama3_8b.sh", RANK="0", WORLD_SIZE="8", **paths)
    assert done.returncode == 2
    data = f"error: --data-path {prefix}: no file {prefix}.bin\n"
    assert done.stderr == f"{data}error: --tokenizer-model {tokenizer}: no such file or folder\n"


def _echo(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_without_ranks_it_starts_torchrun(tmp_path):
    _echo(tmp_path, "python", 'printf "%s\\n" "$@"')
    settings = {"NNODES": "2", "NODE_RANK": "1", "GPUS_PER_NODE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    done = run("examples/pretrain_llama3_8b.sh", "--seed", "5", PYTHON=str(tmp_path / "python"), DATA_PATH="0.3 /a 0.7 /b", **settings)
    words = done.stdout.split("\n")
    expected = f"{ROOT}/scripts/torchrun.py --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr node0 --master-port 1234 --module"
    assert " ".join(words).startswith(expected + " megatron_llama3.recipes.pretrain --model-name llama3-8b")
    assert "0:1024 252M:1024 2.87T:2048" in words  # one argument, spaces and all
    assert " --data-path 0.3 /a 0.7 /b --split" in " ".join(words)
    assert words[-3:] == ["--seed", "5", ""]
