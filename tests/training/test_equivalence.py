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
from megatron_llama3.planning.equivalence import BOUNDS, Difference, Trace, compare, one_process, train_under
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
QUICK, SAMPLE = MATRIX[:5], MATRIX[5:9] + DEEPSPEED[:2]
PLAIN: Row = {axis: values[0] for axis, values in AXES.items()}

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
    for pp, cp in ((2, 2), (2, 3), (2, 4), (3, 2), (4, 2)):
        assert (("cp", cp), ("pp", pp)) in covered
    for cp in (3, 4):
        for other, value in (("tp", 2), ("sp", True), ("dp", 2), ("schedule", "zero-bubble"), ("micro_batch", 2), ("positions", "reset")):
            assert covered & {(("cp", cp), (other, value)), ((other, value), ("cp", cp))}
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


@pytest.mark.parametrize("row", QUICK, ids=name_of)
def test_first_rows(row):
    check(row, dtypes_of(row)[0], steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("row", SAMPLE, ids=name_of)
def test_next_rows(row):
    check(row, dtypes_of(row)[0], steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("row", QUICK[:3], ids=name_of)
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
def test_rounding_alone_stays_within_the_bounds():
    """The deepest model of the matrix in one process, its micro-batches cut in two ways: what differs is the order of sums."""
    config = one_process(config_of(max(MATRIX, key=lambda row: (config_of(row).model.num_layers, row["tied"])), "fp32"))
    traces = []
    for config.training.micro_batch_size in (1, 6):
        traces.append(train_under(config, STEPS))
    found = compare(*traces)
    assert found.loss <= BOUNDS["fp32"]["loss"] / 2
    assert found.gradient <= BOUNDS["fp32"]["gradient"] / 2
    assert traces[0].losses[-1] != traces[0].losses[0]


@pytest.mark.slow
def test_random_layouts():
    seed = int(os.environ.get("LAYOUT_SEED") or random.SystemRandom().randrange(10**6))
    print(f"LAYOUT_SEED={seed}")
    rows = random_rows(random.Random(seed))
    for row in [next(rows) for _ in range(4)]:
        print(name_of(row))
        check(row, dtypes_of(row)[0], steps=2)


# What people run. The first rows of the sample would not do: few of them have several axes at once.
BF16_ROWS: list[Row] = [
    {**PLAIN, **row}
    for row in (
        {"tp": 2, "sp": True, "pp": 2, "v": 2, "dp": 2, "reduce_every": 2},
        {"tp": 4, "kv_heads": 2, "tied": True},
        {"cp": 2, "dp": 2, "recompute": "full-uniform-1"},
        {"pp": 3, "schedule": "zero-bubble", "split": "embedding+loss", "dp": 2},
        {"tp": 3, "sp": True, "pp": 2, "tied": True, "frozen": True},
        {"tp": 2, "sp": True, "cp": 2, "pp": 2, "schedule": "zero-bubble", "v": 2, "micro_batch": 2},
        {"pp": 2, "dp": 2, "micro_batch": 3},
        {"pp": 2, "dp": 2, "schedule": "zero-bubble", "reduce_every": 1},
    )
]
BF16_ROWS += [{**row, "engine": "deepspeed-zero-1"} for row in BF16_ROWS[:2]] if DEEPSPEED else []
BF16_ROWS += [{**PLAIN, "tp": 2, "sp": True, "dp": 2, "engine": f"deepspeed-zero-{stage}"} for stage in (2, 3)] if DEEPSPEED else []


def check_bf16(row: Row, steps: int) -> None:
    """The error against fp32 is at most twice that of one bf16 process."""
    config = config_of(row, "bf16")
    fp32 = reference(row, config_of(row, "fp32"), steps)
    alone = compare(reference(row, config, steps), fp32)
    found = compare(train_under(config, steps, trainable_of(row)), fp32)
    for kind in ("loss_rms", "all_gradients", "gradient"):
        ours, bound = getattr(found, kind), 2 * getattr(alone, kind)
        assert ours <= bound, f"{name_of(row)} in bf16: {kind} {ours:.2e}, twice one process's is {bound:.2e}"
    assert found.copies == 0
    assert alone.all_gradients > 1e-3, "this is no bf16 run"


@pytest.mark.slow
@pytest.mark.parametrize("row", [BF16_ROWS[0], BF16_ROWS[3], *BF16_ROWS[8:9]], ids=name_of)
def test_bf16_sample(row):
    check_bf16(row, steps=5)


@pytest.mark.full
@pytest.mark.parametrize("row", BF16_ROWS, ids=name_of)
def test_bf16(row):
    check_bf16(row, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"dp": 2}, {"dp": 2, "reduce_every": 1}, {"pp": 2, "schedule": "zero-bubble"}], ids=str)
def test_bf16_error_does_not_grow_with_micro_batches(layout):
    def trace(dtype: str, microbatches: int) -> Trace:
        row = {**PLAIN, **layout}
        config = config_of(row, dtype)
        config.training.global_batch_size = 32 * row["dp"]
        config.training.micro_batch_size = 32 // microbatches
        return train_under(config if dtype == "bf16" else one_process(config), 1)

    fp32 = trace("fp32", 32)
    few, many = (compare(trace("bf16", m), fp32) for m in (1, 32))
    assert many.all_gradients <= 1.1 * few.all_gradients
    assert many.gradient <= 1.2 * few.gradient


COMPILED: list[Row] = [
    {**PLAIN, **row, "compile": True}
    for row in (
        {"tp": 2, "sp": True},
        {"tp": 2, "sp": True, "recompute": "full-uniform-1"},
        {"dp": 2, "recompute": "selective-layernorm"},
        {"pp": 2, "v": 2, "recompute": "full-uniform-1"},
        {"cp": 2, "dp": 2},
    )
]


@pytest.mark.full
@pytest.mark.parametrize("row", COMPILED, ids=name_of)
def test_compiled_blocks(row):
    check(row, "fp64", steps=3)
