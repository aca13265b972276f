"""Whether a run fits, and that what would make it fit does."""

import re

import pytest

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.schedules import phases
from megatron_llama3.planning.estimate import describe
from megatron_llama3.planning.fit import GIB, changes_that_fit, spare_bytes
from megatron_llama3.planning.memory import peak_memory

RUN = [
    "--dry-run", "--model-name", "llama3-8b", "--bf16", "--seq-length", "8192", "--world-size", "64", "--global-batch-size", "256",
    "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2",
]  # fmt: skip


def needed(flags: list[str]) -> float:
    config = parse_run_config(flags)
    return peak_memory(config, phases(config)[0]).total / GIB


def test_a_run_fits_with_the_reserve_and_not_with_a_byte_less():
    config = parse_run_config(RUN)
    total = peak_memory(config, phases(config)[0]).total
    config.parallel.device_memory_gib, config.parallel.device_memory_reserve_gib = total / GIB + 2, 2
    assert spare_bytes(config, total) == pytest.approx(0, abs=1)
    assert re.search(r"fits a GPU of [\d.]+ GiB less 2 in reserve: -?0.00 GiB to spare", describe(config))


@pytest.mark.parametrize("more", ["", "--recompute-granularity selective --recompute-modules layernorm"], ids=["plain", "norms remade"])
def test_what_would_fit_does(more):
    """Each change that the dry run offers, given as the flags that it prints, behind those of the run."""
    run = [*RUN, *more.split()]
    device = ["--device-memory-gib", f"{needed(run) + 4.5:.3f}"]
    lines = describe(parse_run_config([*run, *device])).splitlines()
    assert any(re.fullmatch(r" +does not fit a GPU of [\d.]+ GiB less 5 in reserve: 0.50 GiB too much", line) for line in lines)
    offers = [re.fullmatch(r" +would fit with (.+): ([\d.]+) GiB to spare", line) for line in lines if "would fit" in line]
    assert offers
    for offer in offers:
        config = parse_run_config([*run, *device, *offer[1].split()])
        spare = spare_bytes(config, peak_memory(config, phases(config)[0]).total) / GIB
        assert 0 <= spare == pytest.approx(float(offer[2]), abs=0.01)


def test_says_so_where_nothing_helps():
    text = describe(parse_run_config([*RUN, "--device-memory-gib", "6"]))
    assert "makes it fit" in text
    assert "would fit" not in text


def test_no_offer_only_adds_to_another_that_fits():
    config = parse_run_config(RUN)
    offered = set()
    for gib in range(8, 40, 2):
        config.parallel.device_memory_gib = float(gib)
        offers = [frozenset(re.findall(r"--[a-z-]+ \S+", change.flags)) for change in changes_that_fit(config, phases(config)[0], count=9)]
        assert not any(a < b for a in offers for b in offers)
        offered |= set(offers)
    assert len(offered) > 3
