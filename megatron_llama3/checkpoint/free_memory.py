"""How much memory this process may still take: the machine's, or what is left to its control group where a job scheduler set a limit."""

from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 says "no limit" by a number of this size


def free_memory(root: Path = Path("/")) -> int:
    """Bytes; 0 where the system does not say. `root`: of the file system, another one in tests."""
    lines = _lines(root / "proc/meminfo")
    machine = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    return max(0, min([machine, *_left_to_groups(root)]))


def _left_to_groups(root: Path) -> list[int]:
    """What each limited control group of this process, and each group above it, has left: versions 2 and 1 of the interface."""
    left = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            group = base.joinpath(*parts[:depth])
            numbers = [*_lines(group / limit)[:1], *_lines(group / used)[:1]]
            if len(numbers) == 2 and numbers[0].isdecimal() and int(numbers[0]) < _UNLIMITED:
                left.append(int(numbers[0]) - int(numbers[1]))
    return left


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
