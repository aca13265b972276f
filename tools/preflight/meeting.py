"""How ranks that may not reach each other hand rank 0 what they found, and end together."""

import json
import os
import subprocess
import time
from datetime import timedelta
from typing import Any

from .place import NODE, PATIENCE, RANK, RANKS_PER_NODE, WORLD_SIZE


class Meeting:
    """The ranks' one store, at MASTER_ADDR and MASTER_PORT on rank 0: it needs no connection between any two others."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 29400))
        try:
            self.store = TCPStore(address, port, WORLD_SIZE, RANK == 0, timedelta(seconds=PATIENCE), wait_for_workers=False)
        except RuntimeError as error:
            raise SystemExit(f"preflight: rank {RANK} on {NODE} does not reach rank 0 at {address}:{port}: {first_line(error)}") from None

    def gather(self, stage: str, value: Any) -> list[Any]:
        """On rank 0 the values of all ranks, on others an empty list. Ends all if a rank does not come."""
        self.store.set(f"{stage}/{RANK}", json.dumps(value))
        if RANK != 0:
            return []
        deadline = time.monotonic() + PATIENCE
        for rank in range(WORLD_SIZE):
            try:
                self.store.wait([f"{stage}/{rank}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
            except RuntimeError:  # a DistStoreError, out of time
                missing = [r for r in range(WORLD_SIZE) if not self.store.check([f"{stage}/{r}"])]
                self.settle(stage, [f"after {PATIENCE:g} s there is no word ({stage}) from {named_ranks(missing)}"], status=1)
        return [json.loads(self.store.get(f"{stage}/{rank}")) for rank in range(WORLD_SIZE)]

    def settle(self, stage: str, failures: list[str], status: int) -> None:
        """Goes on if rank 0 found no failures; else it prints them, and every rank exits with `status`."""
        if RANK != 0:
            self.store.wait([f"{stage}/verdict"], timedelta(seconds=3 * PATIENCE))  # rank 0 may have waited for others
            if self.store.get(f"{stage}/verdict") == b"on":
                return
            self.close()
            raise SystemExit(status)
        for line in failures:
            say(f"FAILED: {line}")
        self.store.set(f"{stage}/verdict", "end" if failures else "on")
        if failures:
            self.close()
            raise SystemExit(status)

    def close(self) -> None:
        """Rank 0, where the store lives, leaves last."""
        if RANK != 0:
            self.store.add("left", 1)
            return
        deadline = time.monotonic() + 10
        while self.store.add("left", 0) < WORLD_SIZE - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


def say(line: str) -> None:
    print(f"preflight: {line}", flush=True)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def named_ranks(ranks: list[int]) -> str:
    """For example: rank 3 of node n2, ranks 16 to 23 of node n5; by Slurm's list of nodes where there is one."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    command = ["scontrol", "show", "hostnames", listed or ""]
    nodes = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split() if listed else []
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(rank // RANKS_PER_NODE, []).append(rank)
    parts = []
    for node, own in by_node.items():
        count = f"rank {own[0]}" if len(own) == 1 else f"ranks {own[0]} to {own[-1]}"
        parts.append(f"{count} of node {nodes[node] if node < len(nodes) else node}")
    return ", ".join(parts)
