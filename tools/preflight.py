"""Whether the machines of a run can run it, in seconds and before it starts. scripts/preflight.sh starts this on every rank, with the flags
of the run, or without any: then no files are looked at.

Rank 0 prints; each failure is one line. The exit status is 0 if all is well, 1 if a machine is out of reach, unlike the others or slow
(other machines may do), 2 if a flag, a file or a folder is refused.

From the environment: PREFLIGHT_GPUS, how many GPUs a node must have (0: any number, none too); PREFLIGHT_SLOWER (3), how many times the
median's time a transfer between two nodes may take; PREFLIGHT_SECONDS (120), how long to wait for a rank.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.errors import UserError, exit_on_user_error
from megatron_llama3.config.model import parameter_count
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.validate import missing_inputs
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.sidecar import describe_damaged_block, read_sidecar

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RANKS_PER_NODE = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or WORLD_SIZE)
NODE = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
PATIENCE = float(os.environ.get("PREFLIGHT_SECONDS", 120))
SLOWER = float(os.environ.get("PREFLIGHT_SLOWER", 3))
GPUS_ASKED = int(os.environ.get("PREFLIGHT_GPUS") or 0)
PACKAGE = Path(__file__).parents[1] / "megatron_llama3"
CHECKED_BLOCKS = 2  # of each dataset and rank: many ranks read much of it, and none reads long
MARKER = ".preflight"
GIB = 2**30


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


def say(line: str) -> None:
    print(f"preflight: {line}", flush=True)


def run_config(argv: list[str]) -> RunConfig:
    """The run's config, held to the files of this machine too. Parsed as a dry run, which may imagine another --world-size."""
    config = parse_run_config([*argv, "--dry-run"])
    if missing := list(missing_inputs(config)):
        raise UserError("\n".join(missing))
    return config


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


# Machines.


def machine() -> dict[str, str]:
    """What must be alike on all nodes."""
    import torch

    facts = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    for package in ("megatron-core", "deepspeed"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    driver = Path("/sys/module/nvidia/version")
    facts["driver"] = driver.read_text().strip() if driver.exists() else "none"
    digest = 0
    for path in sorted(PACKAGE.glob("*/*.py")):
        digest = zlib.crc32(path.read_bytes(), digest)
    facts["code"] = f"{digest:08x}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts["GPUs"] = " and ".join(f"{n} x {name}" for name, n in Counter(gpu_name(gpu) for gpu in gpus).items()) or "none"
    facts["GPU count"] = str(len(gpus))
    return facts


def gpu_name(gpu: Any) -> str:
    return f"{gpu.name} of {gpu.total_memory / 2**30:.0f} GiB"


def misplaced(entries: list[dict]) -> list[str]:
    """Ranks are counted by node: the same number on each, one node after the other."""
    wrong = [r for r, entry in enumerate(entries) if entry["node"] != entries[r // RANKS_PER_NODE * RANKS_PER_NODE]["node"]]
    return [f"rank {wrong[0]} is on {entries[wrong[0]]['node']}: each node must have {RANKS_PER_NODE} ranks in a row"] if wrong else []


def unlike(nodes: dict[str, dict[str, str]]) -> list[str]:
    """A line for every fact in which a node differs from most, and one for the nodes with fewer GPUs than asked for."""
    failures = []
    for fact in next(iter(nodes.values()), {}):
        by_value: dict[str, list[str]] = {}
        for node, facts in nodes.items():
            by_value.setdefault(facts[fact], []).append(node)
        usual, *others = sorted(by_value, key=lambda value: -len(by_value[value]))
        failures += [f"{fact} is {other} on {listed(by_value[other])}, but {usual} on {listed(by_value[usual])}" for other in others]
    short = [node for node, facts in nodes.items() if int(facts["GPU count"]) < GPUS_ASKED]
    if short:
        failures.append(f"{GPUS_ASKED} GPUs a node are asked for, but {listed(short)} has {nodes[short[0]]['GPUs']}")
    return failures


def listed(nodes: list[str]) -> str:
    return ", ".join(nodes) if len(nodes) <= 8 else f"{', '.join(nodes[:8])} and {len(nodes) - 8} more"


def summary(nodes: dict[str, dict[str, str]]) -> list[str]:
    """Two lines about machines that are all alike; none on ranks that do not have them."""
    if not nodes:
        return []
    facts = next(iter(nodes.values()))
    gpus = "no GPU: the run would be on CPUs" if facts["GPUs"] == "none" else f"{facts['GPUs']} on each"
    versions = ", ".join(f"{name} {facts[name]}" for name in facts if name not in ("GPUs", "GPU count"))
    return [f"{len(nodes)} node{'s' * (len(nodes) > 1)} of {RANKS_PER_NODE} rank{'s' * (RANKS_PER_NODE > 1)}; {gpus}", versions]


# Files.


def file_failures(meeting: Meeting, config: RunConfig) -> list[str]:
    """What this rank finds wrong. All look at a few blocks of the data, one of each node at its index and at the checkpoint folder too."""
    data, save, of_node = config.data, config.checkpoint.save, RANK % RANKS_PER_NODE == 0
    entries = [*data.data_path, *data.train_data_path, *data.valid_data_path]
    failures = []
    for prefix in dict.fromkeys(entry for entry in entries if os.path.exists(f"{entry}.idx")):
        failures += refusal_of(lambda prefix=prefix: IndexedDataset(prefix)) if of_node else []
        failures += refusal_of(lambda prefix=prefix: check_blocks(prefix))
    if save is not None and RANK == 0:
        failures += refusal_of(lambda: make_room(Path(save), checkpoint_bytes(config)))
    elif save is not None and of_node:
        meeting.store.wait(["files/0"], timedelta(seconds=PATIENCE))
        if not (Path(save) / MARKER).exists():
            failures.append(f"--save {save} is not shared: {NODE} does not see what rank 0 wrote there")
    return failures


def refusal_of(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (UserError, OSError) as error:
        return [f"{first_line(error)} (on {NODE})"]
    return []


def check_blocks(prefix: str) -> None:
    """Compares the rank's share of PREFIX.bin with its checksums. Raises UserError."""
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return
    expected = sidecar["files"]["bin"]
    blocks = len(expected["crc32"])
    looked_at = min(blocks, CHECKED_BLOCKS * WORLD_SIZE)
    for i in range(RANK, looked_at, WORLD_SIZE):
        if damage := describe_damaged_block(f"{prefix}.bin", expected, i * blocks // looked_at):
            raise UserError(f"{damage}; make the dataset again, or copy it again")


def checkpoint_bytes(config: RunConfig) -> int:
    """Master weights and Adam's two moments."""
    return 3 * parameter_count(config.model) * (8 if config.optimizer.fp64 else 4)


def make_room(save: Path, needed: int) -> None:
    """Makes the folder and the file by which other nodes know it. Raises UserError where there is no room for one more checkpoint."""
    save.mkdir(parents=True, exist_ok=True)
    (save / MARKER).touch()
    free = shutil.disk_usage(save).free
    if free < needed:
        raise UserError(f"--save {save}: {free / GIB:.1f} GiB are free, a checkpoint takes {needed / GIB:.1f}: make room or name another")
    say(f"--save {save}: {free / GIB:,.1f} GiB free, a checkpoint takes {needed / GIB:,.2f}")


# Transfers.


def check_transfers(meeting: Meeting, nodes: list[str]) -> list[str]:
    """Times an all-reduce over all ranks and transfers between neighbouring nodes. Returns, on rank 0, a line for what is slow."""
    import torch
    import torch.distributed as dist

    use_gpu = torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    place = {"store": dist.PrefixStore("transfers", meeting.store), "rank": RANK, "world_size": WORLD_SIZE}
    try:
        dist.init_process_group("nccl" if use_gpu else "gloo", **place, timeout=timedelta(seconds=PATIENCE))
        buffer = torch.ones((256 if use_gpu else 4) * 2**20 // 4, device="cuda" if use_gpu else "cpu")
        reducing = fastest(lambda: dist.all_reduce(buffer))
        transfers = [between_nodes(neighbour(RANK, WORLD_SIZE, RANKS_PER_NODE, shift), buffer) for shift in (0, 1)]
        dist.destroy_process_group()
    except RuntimeError as error:
        raise SystemExit(f"preflight: FAILED: rank {RANK} on {NODE}: {first_line(error)}") from None
    timings = meeting.gather("timings", transfers)
    if RANK != 0:
        return []
    gigabytes = buffer.nbytes / 1e9
    say(f"all-reduce of {gigabytes * 1e3:.0f} MB over {WORLD_SIZE} ranks: {reducing * 1e3:.1f} ms")
    pairs = pair_times(timings, nodes)
    if pairs:
        rates = sorted(gigabytes / seconds for seconds in pairs.values())
        say(f"p2p between nodes, GB/s a rank: {rates[0]:.2f} at worst, {median(rates):.2f} at the median of {len(rates)} pair(s)")
    return slow(pairs, SLOWER)


def fastest(action: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    import torch

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def neighbour(rank: int, world_size: int, ranks_per_node: int, shift: int) -> int | None:
    """The rank at the same place of the node next to this one: nodes 0-1, 2-3, ..., or with shift 1 1-2, 3-4, ..., and the last with 0."""
    node, place = divmod(rank, ranks_per_node)
    nodes = world_size // ranks_per_node
    for i in range(nodes // 2):
        pair = (2 * i + shift) % nodes, (2 * i + 1 + shift) % nodes
        if node in pair:
            return (sum(pair) - node) * ranks_per_node + place
    return None


def between_nodes(peer: int | None, buffer: Any) -> tuple[int, float] | None:
    """(peer, seconds one way) of a buffer sent to another node and back, both at once on all ranks that have a peer."""
    import torch.distributed as dist

    if peer is None:
        return None
    steps = (dist.send, dist.recv) if peer > RANK else (dist.recv, dist.send)
    return peer, fastest(lambda: [step(buffer, peer) for step in steps]) / 2


def pair_times(timings: list[list[tuple[int, float] | None]], nodes: list[str]) -> dict[tuple[str, str], float]:
    """Seconds of each pair of nodes: of its slowest pair of ranks."""
    pairs: dict[tuple[str, str], float] = {}
    for rank, rounds in enumerate(timings):
        for peer, seconds in filter(None, rounds):
            first, second = sorted((rank, peer))
            pair = nodes[first // RANKS_PER_NODE], nodes[second // RANKS_PER_NODE]
            pairs[pair] = max(pairs.get(pair, 0.0), seconds)
    return pairs


def slow(pairs: dict[tuple[str, str], float], slower: float) -> list[str]:
    """Names what takes more than `slower` times the median: a node if it is slow with each of several others, else the pair."""
    if not pairs:
        return []
    usual = median(pairs.values())
    late = {pair: seconds / usual for pair, seconds in pairs.items() if seconds > slower * usual}
    of_node = {node: [pair for pair in pairs if node in pair] for pair in late for node in pair}
    slow_nodes = [node for node, own in of_node.items() if len(own) > 1 and all(pair in late for pair in own)]
    least = {node: min(late[pair] for pair in of_node[node]) for node in slow_nodes}
    lines = [f"p2p: node {node} takes {times:.1f} times the median with each neighbour" for node, times in least.items()]
    lines += [f"p2p: {a} and {b} take {times:.1f} times the median" for (a, b), times in late.items() if not {a, b} & set(slow_nodes)]
    return lines


if __name__ == "__main__":
    exit_on_user_error(main)
