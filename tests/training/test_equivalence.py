"""Every layout gives the numbers of one process: the pairwise matrix, layouts drawn at random, bf16, and many micro-batches.

    pytest tests/training/test_equivalence.py                 a sample of the matrix in fp64 and fp32
    pytest -m full tests/training/test_equivalence.py         all of it
    LAYOUT_SEED=7 pytest tests/training/test_equivalence.py -k random      the random layouts of an earlier run
"""

import os
import random
from dataclasses import astuple
from importlib.util import find_spec

import pytest

from megatron_llama3.config.run import RunConfig
from megatron_llama3.planning.equivalence import Difference, Trace, compare, one_process, train_under
from tests.training.layouts import (
    AXES,
    DEEPSPEED_AXES,
    Row,
    accepted,
    config_of,
    dtypes_of,
    matrix,
    name_of,
    pairs_of,
    random_rows,
    trainable_of,
)

STEPS = 20
MATRIX = matrix()
# DeepSpeed is an extra: without it its rows are left out.
DEEPSPEED = matrix(DEEPSPEED_AXES, pool=1000) if find_spec("deepspeed") else []
SAMPLE = MATRIX[:8] + DEEPSPEED[:2]
PLAIN: Row = {axis: values[0] for axis, values in AXES.items()}
BOUNDS = {
    "fp64": {"loss": 1e-10, "norm": 1e-10, "gradient": 1e-10, "weight": 1e-8, "copies": 0.0},
    "fp32": {"loss": 1e-6, "norm": 1e-5, "gradient": 1e-5, "copies": 0.0},
}

_references: dict[str, Trace] = {}


def reference(row: Row, config: RunConfig, steps: int) -> Trace:
    """The same run in one process, shared by all rows of one model."""
    config = one_process(config)
    config.training.micro_batch_size = 1
    parts = (config.model, config.data, config.optimizer, config.training)
    key = repr([*map(astuple, parts), steps, row["frozen"] and row["engine"].partition("-")[0]])
    if key not in _references:
        _references[key] = train_under(config, steps, trainable_of(row))
    return _references[key]


def difference(row: Row, dtype: str, steps: int) -> Difference:
    config = config_of(row, dtype)
    return compare(train_under(config, steps, trainable_of(row)), reference(row, config, steps))


def check(row: Row, dtype: str, steps: int) -> None:
    found = difference(row, dtype, steps)
    broken = {kind: (getattr(found, kind), bound) for kind, bound in BOUNDS[dtype].items() if getattr(found, kind) > bound}
    assert not broken, f"{name_of(row)} in {dtype}: {broken}, worst gradient {found.worst_gradient}"


def test_the_matrix_is_large_and_has_every_pair_that_matters():
    assert len(MATRIX) >= 40
    covered = set().union(*map(pairs_of, MATRIX))
    for tp in AXES["tp"]:
        for other, value in (("pp", 2), ("cp", 2), ("dp", 2), ("tied", True), ("frozen", True), ("schedule", "zero-bubble")):
            assert (("tp", tp), (other, value)) in covered
    for pp in (2, 3, 4):
        for schedule in AXES["schedule"]:
            assert (("pp", pp), ("schedule", schedule)) in covered
    microbatches = [config_of(r).training.global_batch_size // (r["micro_batch"] * r["dp"]) for r in MATRIX]
    assert any(m < row["pp"] for m, row in zip(microbatches, MATRIX))
    assert any(m > row["pp"] and m % row["pp"] for m, row in zip(microbatches, MATRIX))
    assert any(config_of(row).model.num_query_groups < row["tp"] for row in MATRIX)


def test_the_axes_say_what_they_mean():
    config = config_of({**PLAIN, "tp": 2, "pp": 2, "v": 3, "recompute": "full-block-1", "split": "embedding+loss"})
    parallel = config.parallel
    assert (parallel.recompute_granularity, parallel.recompute_method, parallel.recompute_num_layers) == ("full", "block", 1)
    assert parallel.world_size == 4
    assert not accepted({**PLAIN, "tp": 2, "kv_heads": 3})


@pytest.mark.parametrize("row", SAMPLE, ids=name_of)
def test_sample_in_the_first_dtype(row):
    check(row, dtypes_of(row)[0], steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("row", SAMPLE[:4], ids=name_of)
def test_sample_in_fp32_over_20_steps(row):
    check(row, "fp32", STEPS)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("row", MATRIX + DEEPSPEED, ids=name_of)
def test_matrix(row, dtype):
    if dtype not in dtypes_of(row):
        pytest.skip(f"{row['engine']} has no {dtype}")
    check(row, dtype, STEPS)


@pytest.mark.slow
def test_random_layouts():
    seed = int(os.environ.get("LAYOUT_SEED") or random.SystemRandom().randrange(10**6))
    print(f"LAYOUT_SEED={seed}")
    rows = random_rows(random.Random(seed))
    for row in [next(rows) for _ in range(4)]:
        print(name_of(row))
        check(row, dtypes_of(row)[0], steps=2)
