"""What a launcher (torchrun, srun) says of a rank in the environment, checked before torch is imported: each gap is one line."""

import os
import socket
import time

from megatron_llama3.config.errors import UserError

_NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launcher() -> None:
    """Raises UserError where the environment describes several ranks, or one of them, and not enough to find the others."""
    environment = os.environ
    if "RANK" not in environment:
        _refuse_lone_task(environment)
        return
    for name in _NEEDED:
        if not environment.get(name):
            raise UserError(f"RANK={environment['RANK']} in the environment, but no {name}: start with scripts/torchrun.py, or set it")
    rank, world_size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    if rank >= world_size:
        raise UserError(f"RANK={rank} in the environment, but WORLD_SIZE={world_size}: ranks count from 0")


def wait_for_rank_0(minutes: float) -> None:
    """Until the rendezvous of MASTER_ADDR takes connections; torch's own waiting ends in pages of C++ frames.

    Raises RuntimeError after so many minutes: a rank that is lost, not a mistake (see training/failures.py)."""
    if os.environ.get("RANK", "0") == "0":
        return
    address, deadline = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + 60 * minutes
    while True:
        try:
            socket.create_connection(address, timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                place = f"rank 0 at {address[0]}:{address[1]}"
                raise RuntimeError(f"Timed out waiting for {place}, which did not come in {minutes:g} minutes: {error}") from None
        time.sleep(1)


def _refuse_lone_task(environment) -> None:
    """Without RANK this would be a job of one process: not what several tasks of a launcher are meant to be."""
    if _number(environment, "WORLD_SIZE", "1") > 1:
        size = environment["WORLD_SIZE"]
        raise UserError(f"WORLD_SIZE={size} in the environment, but no RANK: each process would train alone; start by scripts/torchrun.py")
    task, tasks = _number(environment, "SLURM_PROCID", "0"), _number(environment, "SLURM_STEP_NUM_TASKS", "1")
    if task > 0 or tasks > 1:
        of = f" of {tasks}" if tasks > 1 else ""
        raise UserError(f"task {task}{of} of srun, but there is no RANK: each task would train alone; sbatch scripts/pretrain.sbatch")


def _number(environment, name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name}={text} in the environment is no whole number: the launcher sets it; unset it")
    return int(text)
