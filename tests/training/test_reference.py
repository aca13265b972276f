"""Ten steps of the command line against a plain reference that shares no code with the package, from the files of data to the weights."""

import ast
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.planning import plain_training
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.planning.plain_training import Settings
from tests.training.reference_runs import SETTINGS, Run, ratios, run_command_line, run_reference, use_plain_adam_op
from tests.training.step_faults import STEP_FAULTS, plant_all, start_cpu_adam_at_step_1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Two datasets of a few epochs each, with documents of no, one and many tokens."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in (("large", 24), ("small", 9)):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for length in [0, 1, *rng.integers(2, 40, count)]:
                writer.add_document(rng.integers(0, SETTINGS.vocab_size, length))
            writer.finalize()
    return [str(folder / name) for name in ("large", "small")]


@pytest.fixture(scope="module")
def expected(data):
    """expected(settings) -> what the reference leaves, made once."""
    made: dict[Settings, Run] = {}

    def make(settings: Settings) -> Run:
        if settings not in made:
            (made[settings],) = run_ranks(1, run_reference, settings, data)
        return made[settings]

    return make


OFFLOAD = "--engine deepspeed --optimizer-cpu-offload"
LAYOUTS = {
    "one process fp64": ("--fp64", 1),
    "one process fp32": ("", 1),
    "tp pp fp64": ("--fp64 --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2", 4),
    "cp dp fp32": ("--context-parallel-size 2", 4),
    "cp fp64": ("--fp64 --context-parallel-size 4", 4),
    "zero 1": ("--engine deepspeed", 1),
    "zero 1 dp": ("--engine deepspeed", 2),
    "zero 1 offload": (OFFLOAD, 1),
}


def skip_without_deepspeed(layout: str) -> None:
    if "deepspeed" in layout and not find_spec("deepspeed"):
        pytest.skip("DeepSpeed is an extra")


def check(settings: Settings, data, expected, folder: Path, layout: str, ranks: int, before=lambda: None) -> None:
    found = run_command_line(settings, data, folder, layout, ranks, before)
    exceeded = ratios(found, expected(settings), "fp64" if "--fp64" in layout else "fp32")
    assert all(x <= 1 for x in exceeded.values()), exceeded


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_command_line_equals_the_reference(data, expected, tmp_path, layout, ranks):
    skip_without_deepspeed(layout)
    check(SETTINGS, data, expected, tmp_path, layout, ranks, use_plain_adam_op if layout == OFFLOAD else lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_equal_the_reference(data, expected, tmp_path, stage):
    skip_without_deepspeed("deepspeed")
    check(SETTINGS, data, expected, tmp_path, f"--engine deepspeed --zero-stage {stage} --tensor-model-parallel-size 2", 4)


@pytest.mark.slow
def test_deepspeed_s_own_cpu_adam_equals_the_reference(data, expected, tmp_path):
    skip_without_deepspeed(OFFLOAD)
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load(verbose=False)  # built before the rank's time runs
    check(SETTINGS, data, expected, tmp_path, OFFLOAD, 1)


UNSCALED = {"use_rope_scaling": False, "rope_scaling_original_max_position_embeddings": 8192}
OTHER_SETTINGS = {
    "norms of queries and keys": {"qk_layernorm": True},
    "tied, positions anew": {"untie_embeddings_and_output_weights": False, "reset_position_ids": True},
    "no mask, all targets": {"document_mask": False, "loss_across_documents": True, "clip_grad": 0.0, **UNSCALED},
}


@pytest.mark.parametrize("changes", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_other_settings(data, expected, tmp_path, changes):
    check(replace(SETTINGS, **changes), data, expected, tmp_path, "--fp64", 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--fp64", "--engine deepspeed"])
@pytest.mark.parametrize("plant", [*STEP_FAULTS.values(), plant_all], ids=[*STEP_FAULTS, "all together"])
def test_a_planted_fault_shows(data, expected, tmp_path, layout, plant):
    skip_without_deepspeed(layout)
    found = run_command_line(SETTINGS, data, tmp_path, layout, 1, plant)
    exceeded = ratios(found, expected(SETTINGS), "fp64" if layout == "--fp64" else "fp32")
    assert max(exceeded.values()) >= 100, exceeded


@pytest.mark.slow
def test_cpu_adam_that_starts_at_step_1_shows(data, expected, tmp_path):
    skip_without_deepspeed(OFFLOAD)

    def plant():
        use_plain_adam_op()
        start_cpu_adam_at_step_1()

    exceeded = ratios(run_command_line(SETTINGS, data, tmp_path, OFFLOAD, 1, plant), expected(SETTINGS), "fp32")
    assert max(exceeded.values()) >= 100, exceeded


def test_the_reference_imports_nothing_of_the_package():
    tree = ast.parse(Path(plain_training.__file__).read_text())
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    standard = sys.stdlib_module_names | {"numpy", "torch"}
    assert not [name for name in imported if name.split(".")[0] not in standard]
