"""The names by which a stack is read are those of the code."""

import ast
from functools import cache
from pathlib import Path

import pytest

import megatron_llama3
from megatron_llama3.training.whereabouts import PATIENT, PHASES, SYNCHRONIZING

PACKAGE = Path(megatron_llama3.__file__).parent


@cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    """Those of every file of that name, by name."""
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob(file)]
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file, name", sorted({*PHASES, *SYNCHRONIZING, ("step.py", "train_step")}))
def test_a_function_that_a_phase_is_read_off_exists(file, name):
    assert name in functions(file), f"{file} has no function {name}: rename it in training/whereabouts.py, too"


def test_no_other_file_has_the_name_of_one_that_a_phase_is_read_off():
    """Only the file's last part is looked at; hooks, loops and stores of other packages would be taken for training's."""
    for file, name in PHASES:
        having = [path for path in PACKAGE.rglob(file) if any(f"def {name}(" in line for line in path.read_text().splitlines())]
        assert len(having) == 1, (file, name, having)


@pytest.mark.parametrize("name", ["_forward", "_backward", "_weight_half"])
def test_the_executor_names_its_action_action(name):
    """The micro-batch and chunk of a phase are read off this local variable."""
    function = functions("pipeline_parallel.py")[name]
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} | {argument.arg for argument in function.args.args}
    assert "action" in names
    assert PHASES["pipeline_parallel.py", name] in ("forward", "backward", "weight gradients")


def test_patient_phases_are_phases():
    assert set(PATIENT) <= set(PHASES.values())
