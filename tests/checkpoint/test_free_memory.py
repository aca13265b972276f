"""A job's limit counts, not only the machine's memory."""

import pytest

from megatron_llama3.checkpoint.free_memory import free_memory

GIB = 1 << 30
MACHINE = {"proc/meminfo": f"MemTotal: 99\nMemAvailable:   {64 * GIB // 1024} kB\n"}
CASES = {
    "no limit": ({}, 64),
    "version 2": (
        {"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/memory.max": 8 * GIB, "sys/fs/cgroup/job/memory.current": 3 * GIB},
        5,
    ),
    "version 2, max": ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.max": "max", "sys/fs/cgroup/job/memory.current": GIB}, 64),
    "version 2, the step's": (
        {
            "proc/self/cgroup": "0::/job/step",
            "sys/fs/cgroup/job/memory.max": 8 * GIB,
            "sys/fs/cgroup/job/memory.current": GIB,
            "sys/fs/cgroup/job/step/memory.max": 2 * GIB,
            "sys/fs/cgroup/job/step/memory.current": GIB,
        },
        1,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/job\n2:cpu:/",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 4 * GIB,
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": GIB,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
        },
        3,
    ),
    "all of it used": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB}, 0),
}


@pytest.mark.parametrize("files, expected", CASES.values(), ids=CASES)
def test_the_smallest_limit_counts(tmp_path, files, expected):
    for name, content in {**MACHINE, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(content))
    assert free_memory(tmp_path) == expected * GIB


def test_a_system_that_does_not_say(tmp_path):
    assert free_memory(tmp_path) == 0
