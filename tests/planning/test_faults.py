"""Each planted fault breaks a numeric bound of the matrix at least 100 times over in a run that has its axis, and in no other."""

import pytest

from megatron_llama3.planning.equivalence import BOUNDS, compare, train_under
from tests.planning.faults import FAULTS
from tests.training.layouts import Row, config_of
from tests.training.test_equivalence import PLAIN, reference

ROWS: dict[str, Row] = {
    name: {**PLAIN, **row}
    for name, row in {
        "tp": {"tp": 2, "kv_heads": 2, "micro_batch": 3},
        "sp": {"tp": 2, "sp": True, "micro_batch": 3},
        "cp": {"cp": 2, "micro_batch": 3},
        "tied pp": {"pp": 2, "tied": True, "micro_batch": 3},
        "dp": {"dp": 2, "micro_batch": 3},
        "one micro-batch": {"pp": 2, "micro_batch": 6},
        "tied tp pp": {"tp": 2, "pp": 2, "tied": True, "micro_batch": 3},
        "sp cp": {"tp": 2, "sp": True, "cp": 2, "micro_batch": 2},
    }.items()
}
STEPS = 2


def config_with(row_name: str, scaling: bool = True):
    config = config_of(ROWS[row_name], "fp64")
    config.model.use_rope_scaling = scaling
    return config


def ratios(row_name: str, plant, scaling: bool = True) -> dict[str, float]:
    """By how many times each bound is exceeded."""
    config = config_with(row_name, scaling)
    found = compare(train_under(config, STEPS, before=plant), reference(ROWS[row_name], config, STEPS))
    return {kind: getattr(found, kind) / bound for kind, bound in BOUNDS["fp64"].items() if bound}


def first_row_with_axis(fault: str) -> str:
    return next(name for name in ROWS if FAULTS[fault].has_axis(config_with(name)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault):
    found = ratios(first_row_with_axis(fault), FAULTS[fault].plant)
    assert max(found.values()) >= 100, found


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_faults_change_nothing_where_their_axis_is_missing(row):
    """All of them at once, without RoPE scaling, so that this one has no axis either."""
    absent = [fault for fault in FAULTS.values() if not fault.has_axis(config_with(row, scaling=False))]
    assert absent

    def plant():
        for fault in absent:
            fault.plant()

    found = ratios(row, plant, scaling=False)
    assert max(found.values()) <= 1, found


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_every_row(fault, row):
    found = ratios(row, FAULTS[fault].plant)
    if FAULTS[fault].has_axis(config_with(row)):
        assert max(found.values()) >= 100, found
    else:
        assert max(found.values()) <= 1, found
