"""tools/preflight: what it names as unlike, slow or damaged; and the whole of it on ranks of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from tools.preflight import files, machines, transfers

ROOT = Path(__file__).parents[2]
MODEL = "--model-name tiny --train-iters 2 --seq-length 16"


@pytest.fixture
def data(tmp_path) -> Path:
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_document(np.arange(90))
        writer.finalize()
    return tmp_path / "corpus"


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SLURM_JOB_NODELIST")}
    variables = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", "tools.preflight", *flags]
    return subprocess.run(command, env=kept | variables, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_help_is_the_head_of_the_script():
    done = subprocess.run(["bash", "scripts/preflight.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Checks the machines before a run")
    assert "\n  bash scripts/preflight.sh " in done.stdout


def test_a_node_unlike_the_others_is_named(monkeypatch):
    alike = {"torch": "2.13.0", "GPUs": "8 x H100 of 80 GiB", "GPU count": "8"}
    nodes = {f"n{i}": dict(alike) for i in range(4)}
    assert machines.unlike(nodes) == []
    nodes["n2"]["torch"] = "2.12.0"
    assert machines.unlike(nodes) == ["torch is 2.12.0 on n2, but 2.13.0 on n0, n1, n3"]
    monkeypatch.setattr(machines, "GPUS_ASKED", 9)
    assert "9 GPUs a node are asked for, but n0, n1, n2, n3 has 8 x H100 of 80 GiB" in machines.unlike(nodes)


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 8])
def test_neighbours_are_mutual_and_every_node_has_one(nodes):
    met = set()
    for shift in (0, 1):
        peers = {rank: transfers.neighbour(rank, 2 * nodes, 2, shift) for rank in range(2 * nodes)}
        for rank, peer in peers.items():
            assert peer is None or (peers[peer] == rank and peer % 2 == rank % 2 and peer // 2 != rank // 2)
        met |= {rank for rank, peer in peers.items() if peer is not None}
    assert met == set(range(2 * nodes))


def test_a_slow_node_and_a_slow_pair_are_named():
    ring = {(f"n{i}", f"n{(i + 1) % 8}"): 1.0 for i in range(8)}
    assert transfers.slow(ring, 3) == []
    assert transfers.slow({**ring, ("n2", "n3"): 5.0}, 3) == ["p2p: n2 and n3 take 5.0 times the median"]
    found = transfers.slow({**ring, ("n2", "n3"): 5.0, ("n3", "n4"): 4.0}, 3)
    assert found == ["p2p: node n3 takes 4.0 times the median with each neighbour"]


def test_a_damaged_block_is_refused(data):
    files.check_blocks(str(data))
    (content := bytearray(data.with_suffix(".bin").read_bytes()))[7] ^= 1
    data.with_suffix(".bin").write_bytes(content)
    with pytest.raises(UserError, match="bytes 0 to 180 are damaged"):
        files.check_blocks(str(data))


def test_no_room_for_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="make room"):
        files.make_room(tmp_path / "new", 1 << 60)


def test_a_missing_dataset_is_refused_before_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    done = run(*MODEL.split(), "--data-path", str(tmp_path / "none"), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.returncode, done.stderr) == (2, f"error: --data-path {tmp_path}/none: no file {tmp_path}/none.bin\n")


@pytest.mark.slow
def test_on_this_machine(data, tmp_path):
    flags = [*MODEL.split(), "--data-path", str(data), "--save", str(tmp_path / "save")]
    done = run(*flags, MASTER_PORT="29471")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("preflight: all is well\n")
    assert list((tmp_path / "save").iterdir()) == []
    done = run(MASTER_PORT="29472", PREFLIGHT_GPUS="8")
    assert done.returncode == 1
    assert "FAILED: 8 GPUs a node are asked for" in done.stdout
