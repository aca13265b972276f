"""Whether the machines of a run can run it, in seconds and before it starts. scripts/preflight.sh starts this on every rank, with the flags
of the run, or without any: then no files are looked at.

Rank 0 prints; each failure is one line. The exit status is 0 if all is well, 1 if a machine is out of reach, unlike the others or slow
(other machines may do), 2 if a flag, a file or a folder is refused.

From the environment: PREFLIGHT_GPUS, how many GPUs a node must have (0: any number, none too); PREFLIGHT_SLOWER (3), how many times the
median's time a transfer between two nodes may take; PREFLIGHT_SECONDS (120), how long to wait for a rank.
"""

import sys
from pathlib import Path

from megatron_llama3.config.errors import exit_on_user_error

from .files import MARKER, file_failures, run_config
from .machines import machine, misplaced, summary, unlike
from .meeting import Meeting, say
from .place import NODE, RANK, RANKS_PER_NODE
from .transfers import check_transfers


def main() -> None:
    argv = sys.argv[1:]
    config = run_config(argv) if argv and RANK == 0 else None  # what one rank refuses, one rank prints
    meeting = Meeting()

    entries = meeting.gather("machine", {"node": NODE, "facts": machine() if RANK % RANKS_PER_NODE == 0 else None})
    nodes = {entry["node"]: entry["facts"] for entry in entries[::RANKS_PER_NODE]}
    meeting.settle("machine", misplaced(entries) + unlike(nodes), status=1)
    for line in summary(nodes):
        say(line)

    if argv:
        config = config or run_config(argv)
        failures = meeting.gather("files", file_failures(meeting, config))
        if RANK == 0 and config.checkpoint.save is not None:
            (Path(config.checkpoint.save) / MARKER).unlink(missing_ok=True)
        meeting.settle("files", list(dict.fromkeys(line for found in failures for line in found)), status=2)

    meeting.settle("transfers", check_transfers(meeting, list(nodes)), status=1)
    meeting.close()
    if RANK == 0:
        say("all is well")


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
