"""What must be alike on all nodes: versions, code, drivers and GPUs."""

import platform
import zlib
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .place import GPUS_ASKED, RANKS_PER_NODE

PACKAGE = Path(__file__).parents[2] / "megatron_llama3"


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
