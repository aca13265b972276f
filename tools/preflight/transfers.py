"""An all-reduce and transfers between neighbouring nodes, timed; what is slow beside the others is named."""

import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from typing import Any

from .meeting import Meeting, first_line, say
from .place import LOCAL_RANK, NODE, PATIENCE, RANK, RANKS_PER_NODE, SLOWER, WORLD_SIZE


def check_transfers(meeting: Meeting, nodes: list[str]) -> list[str]:
    """Times an all-reduce over all ranks and transfers between neighbouring nodes. Returns, on rank 0, a line for what is slow."""
    import torch
    import torch.distributed as dist

    use_gpu = torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(LOCAL_RANK)
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
