"""For every test: the user's cache is left alone. For some: a Slurm, and a disk that is small enough to fill."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.slurm_cluster import CANNOT_BE_INSTALLED, Slurm

_kept = os.environ.get("XDG_CACHE_HOME")


def pytest_configure(config):
    """Before any test module is imported, as some copy the environment for the tools that they start."""
    # What DeepSpeed compiles takes a minute, so that alone is kept from one test run to the next.
    compiled = Path(_kept or Path.home() / ".cache", "torch_extensions", f"py{sys.version_info.major}{sys.version_info.minor}_tests")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled))
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="megatron_llama3-test-cache-")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ.pop("XDG_CACHE_HOME"), ignore_errors=True)
    if _kept is not None:
        os.environ["XDG_CACHE_HOME"] = _kept


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Skips only where Slurm cannot be installed, and not even there if REQUIRE_SLURM is set, as .ci/run does."""
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    up = cluster.local("up")
    if up.returncode == CANNOT_BE_INSTALLED and not os.environ.get("REQUIRE_SLURM"):
        pytest.skip(up.stderr.strip())
    assert up.returncode == 0, up.stderr
    yield cluster
    cluster.local("down")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) -> folder on a file system of its own of that size."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        refused = subprocess.run(command, capture_output=True, text=True)
        if refused.returncode:
            pytest.skip(f"mounting a small file system needs root: {refused.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
