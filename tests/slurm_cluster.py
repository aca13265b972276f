"""A Slurm of two nodes on this machine, for tests, by scripts/slurm_local.sh. The fixture is in tests/conftest.py."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCAL = ROOT / "scripts" / "slurm_local.sh"
CANNOT_BE_INSTALLED = 77
PATIENCE = 400  # seconds; a start takes 20 on two idle cores


class Slurm:
    """The local cluster, by its commands."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        self.environment = {k: v for k, v in os.environ.items() if k not in mine and not k.startswith("SLURM")} | {
            "SLURM_LOCAL_DIR": str(folder),
            "SLURM_LOCAL_PORT": str(port),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def local(self, *argv: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", LOCAL, *argv], env=self.environment, capture_output=True, text=True, timeout=PATIENCE)

    def run(self, *argv: str, **variables: str) -> str:
        done = subprocess.run(argv, env=self.environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *argv: str, **variables: str) -> str:
        return self.run("sbatch", "--parsable", *argv, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; of an array the first task."""
        text = self.run("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S+)", text.split("\n\n")[0]))

    def states(self, job: str) -> list[str]:
        return re.findall(r"JobState=(\S+)", self.run("scontrol", "show", "job", job))
