"""Ends a rank whose launcher died: nobody would end it otherwise, and it would go on writing beside the run that takes its place."""

import os
import sys
import threading
import time

from megatron_llama3.training.stop import RESTART_STATUS

INTERVAL_SECONDS = 2.0


def end_with_launcher() -> None:
    """Watches from a thread that the process which started this rank is still its parent; without RANK in the environment, does nothing."""
    if "RANK" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(INTERVAL_SECONDS)
    rank = os.environ["RANK"]
    print(f"error: rank {rank}: its launcher (process {launcher}) is gone; start the run again to go on", file=sys.stderr, flush=True)
    os._exit(RESTART_STATUS)
