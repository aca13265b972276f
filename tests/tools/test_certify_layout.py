"""The certificate from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_tool(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "certify_layout.py"), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_writes_a_certificate(tmp_path):
    flags = "--world-size 4 --pipeline-model-parallel-size 2 --num-layers 4 --pipeline-schedule zero-bubble --global-batch-size 6"
    done = run_tool("--certificate", "out.md", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("# Layout certificate: PASSED")
    assert "PP 2 x DP 2, M 5" in text
    assert "BROKEN" not in text
    assert "schedule zero-bubble" in text


def test_a_layout_that_cannot_work_is_one_line(tmp_path):
    done = run_tool("--world-size", "6", "--tensor-model-parallel-size", "4", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: world size 6 is not divisible by TP x PP x CP" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_shows_its_own_flag_and_those_of_the_run(tmp_path):
    done = run_tool("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[--certificate FILE.md]" in done.stdout
    assert "Where to write it." in done.stdout
    assert "--tensor-model-parallel-size N" in done.stdout
