"""The table of kept tensors against real runs of the matrix, name by name: what autograd saves, and what stays alive."""

import pytest

from megatron_llama3.config.run import RunConfig
from megatron_llama3.planning.local_ranks import run_ranks
from tests.planning.kept_tensors import ONLY_ON_A_CPU, KeptByForward, measure_rank
from tests.training.layouts import AXES, Row, config_of, matrix, name_of

PLAIN: Row = {axis: values[0] for axis, values in AXES.items()}
QUICK = [
    PLAIN | {"tp": 2, "sp": True, "pp": 2, "v": 2, "tied": True},
    PLAIN | {"tp": 4, "cp": 2, "kv_heads": 2, "micro_batch": 2},
    PLAIN | {"tp": 2, "sp": True, "pp": 2, "schedule": "zero-bubble", "positions": "no document mask"},
    PLAIN | {"pp": 2, "dp": 2, "split": "embedding", "recompute": "full-uniform-2"},
    PLAIN | {"tp": 3, "sp": True, "kv_heads": 3, "recompute": "selective-layernorm"},
    PLAIN | {"tp": 4, "kv_heads": 2, "qk_norm": True},
]
# Only axes that change what is kept; of frozen weights no formula knows, as no flag freezes any.
SAME_KEPT = {"frozen": (False,), "n": (None,), "reduce_every": (None,), "dp": (1, 2), "split": ("even", "embedding", "loss")}
MATRIX = matrix(AXES | SAME_KEPT, pool=1000)


def config_of_row(row: Row) -> RunConfig:
    """In fp32, in which a CPU's norms and softmax keep what a GPU's keep, and a little more that is told apart."""
    config = config_of(row, "fp32")
    config.training.attention_kernel = "sdpa"
    return config


def check(row: Row) -> None:
    config = config_of_row(row)
    for forwards in run_ranks(config.parallel.world_size, measure_rank, config):
        for forward in forwards:
            check_forward(forward, has_checkpoint=row["recompute"] not in (None, "selective-layernorm"))


def check_forward(forward: KeptByForward, has_checkpoint: bool) -> None:
    kept = {name: size for name, size in forward.measured.items() if name != ONLY_ON_A_CPU}
    if not has_checkpoint:  # which keeps what it will start from out of sight of hooks
        assert kept == pytest.approx(forward.planned, rel=0.01)
    only_here = forward.measured.get(ONLY_ON_A_CPU, 0)
    assert forward.live - only_here == pytest.approx(sum(forward.planned.values()), rel=0.01)


@pytest.mark.parametrize("row", QUICK, ids=name_of)
def test_kept_by_name(row):
    check(row)


@pytest.mark.full
@pytest.mark.parametrize("row", MATRIX, ids=name_of)
def test_kept_by_name_over_the_matrix(row):
    check(row)
