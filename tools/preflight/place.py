"""Where this rank sits, and what the environment asks of the checks."""

import os
import socket

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
RANKS_PER_NODE = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or WORLD_SIZE)
NODE = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
PATIENCE = float(os.environ.get("PREFLIGHT_SECONDS", 120))
SLOWER = float(os.environ.get("PREFLIGHT_SLOWER", 3))
GPUS_ASKED = int(os.environ.get("PREFLIGHT_GPUS") or 0)
