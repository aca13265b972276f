"""What each rank's last collectives were when a run hung: torch's flight recorder, written beside the hang report.

    python -m torch.distributed.flight_recorder.fr_trace LOGS/flight_recorder/nccl

reads the files of all ranks and names the first collective in which they differ; a rank without a file was stopped. Those of gloo, the
control groups of a GPU job and all of a CPU's, are pickles of the same form, which torch's reader does not take: it misses their groups.
"""

import os
from pathlib import Path

from megatron_llama3.parallel.torch_private import recorded_collectives

FOLDER = "flight_recorder"


def keep_collectives() -> None:
    """Called before the first process group is made. What the user has set in the environment stays: a size of 0 keeps none."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # where NCCL's own limit is the shorter one; it writes to /tmp


def write_collectives(logs: Path | None, rank: int) -> None:
    """`logs`/flight_recorder/BACKEND/rank_RANK for each backend that has recorded any; about 0.4 MB. Raises OSError."""
    if logs is None:
        return
    for backend, trace in recorded_collectives().items():
        folder = logs / FOLDER / backend
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{rank}").write_bytes(trace)
