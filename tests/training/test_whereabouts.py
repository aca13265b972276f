"""The names by which a stack is read are those of the code; what is read off a stack."""

import ast
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megatron_llama3
from megatron_llama3.training import whereabouts
from megatron_llama3.training.whereabouts import PHASES, SYNCHRONIZING, Place, place_of_error

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


def test_what_the_watchdog_treats_apart_are_phases():
    assert {*whereabouts.MOVING, whereabouts.STORAGE} <= set(PHASES.values())
    assert whereabouts.COMPILING in whereabouts.TORCH_PHASES.values()


@pytest.mark.parametrize("file, name", whereabouts.TORCH_PHASES)
def test_torch_compiles_in_functions_of_these_names(file, name):
    (path,) = [path for folder in ("_dynamo", "_inductor") for path in (Path(torch.__file__).parent / folder).glob(file)]
    assert name in {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("busy, waits", [("checkpoint-file_0", False), ("AsyncCheckpointExecutor_0", True), ("checkpoint_0", False)])
def test_who_waits_for_a_save_stands_where_its_background_thread_stands(monkeypatch, busy, waits):
    """The main thread waits for a future, which says nothing of whom the job waits for."""
    idle = stack_of(("thread.py", "_worker", "concurrent.futures.thread"))[0][0]
    collective = (("distributed_c10d.py", "gather_object", DIST), ("c10d_logger.py", "wrapper", "torch.distributed.c10d_logger"))
    works = (("x.py", "outer", OURS), *collective[::-1]) if waits else (("x.py", "outer", OURS), ("publish.py", "sync", OURS))
    frames = {1: stack_of(("store.py", "wait", OURS), ("_base.py", "result", "concurrent.futures._base"))[0][0]}
    frames |= {2: stack_of(*works)[0][0], 3: idle}
    monkeypatch.setattr(whereabouts.sys, "_current_frames", lambda: frames)
    names = [SimpleNamespace(name=busy, ident=2), SimpleNamespace(name="MainThread", ident=1)]
    names += [SimpleNamespace(name="checkpoint_0", ident=3)] * (busy != "checkpoint_0")
    monkeypatch.setattr(whereabouts.threading, "enumerate", lambda: names)
    place = whereabouts.place_of_thread(1)
    call = "gather_object in outer (x.py:10)" if waits else "sync (publish.py:10)"
    assert place == Place("waiting for a save", call, waits, False)
    frames[2] = idle
    assert whereabouts.place_of_thread(1).call == "result (_base.py:10)"


def stack_of(*calls: tuple[str, str, str], action=None) -> list:
    """The stack of functions (file, name, module), outermost first, each of which calls the next in its 10th line; innermost first."""
    namespace = {"leaf": lambda: frames.extend(whereabouts.traceback.walk_stack(sys._getframe(1))), "action": action}
    frames: list = []
    for file, name, module in reversed(calls):
        scope = {"__name__": module, "inner": namespace["leaf"], "the_action": action}
        exec(compile("\n" * 7 + f"def {name}():\n    action = the_action\n    inner()\n", f"/somewhere/{file}", "exec"), scope)
        namespace["leaf"] = scope[name]
    namespace["leaf"]()
    return frames[: len(calls)]


OURS, TORCH, DIST = "megatron_llama3.x", "torch.nn.functional", "torch.distributed.distributed_c10d"
STEP = ("step.py", "train_step", OURS)


def test_a_collective_is_named_with_who_called_it():
    reduce = (("distributed_c10d.py", "all_reduce", DIST), ("c10d_logger.py", "wrapper", "torch.distributed.c10d_logger"))
    calls = (STEP, ("engine.py", "forward_backward", OURS), ("collectives.py", "reduce_from_group", OURS), *reversed(reduce))
    place = whereabouts._place(stack_of(*calls))
    assert place == Place("forward and backward", "all_reduce in reduce_from_group (collectives.py:10)", True, True)
    wrapped = whereabouts._place(stack_of(*calls, ("distributed_c10d.py", "wrapper", DIST)))
    assert wrapped.call == place.call, "a decorator's name is no collective's"


def test_work_in_torch_is_named_by_who_called_it_and_is_no_waiting():
    calls = (STEP, ("engine.py", "forward_backward", OURS), ("llama.py", "forward", OURS), ("functional.py", "silu", TORCH))
    assert whereabouts._place(stack_of(*calls)) == Place("forward and backward", "forward (llama.py:10)", False, True)
    only_torch = whereabouts._place(stack_of(("functional.py", "linear", TORCH), ("functional.py", "silu", TORCH)))
    assert only_torch == Place("between phases", "silu", False, False)
    assert whereabouts._place([]) == Place("not running", "no frame", False, False)


def test_a_phase_is_told_with_its_micro_batch_and_chunk():
    class Action:
        microbatch, chunk = 3, 1

    calls = (STEP, ("engine.py", "forward_backward", OURS), ("pipeline_parallel.py", "_forward", OURS), ("llama.py", "forward", OURS))
    place = whereabouts._place(stack_of(*calls, action=Action))
    assert str(place) == "forward and backward, forward of micro-batch 3 in chunk 1: forward (llama.py:10)"


def test_the_executor_itself_waits_and_on_a_gpu_who_synchronizes():
    calls = (STEP, ("pipeline_parallel.py", "run", OURS))
    assert whereabouts._place(stack_of(*calls)).is_waiting
    calls = (STEP, ("engine.py", "clip_gradients", OURS))
    assert [whereabouts._place(stack_of(*calls), on_gpu).is_waiting for on_gpu in (False, True)] == [False, True]
    inner = (*calls, ("llama.py", "forward", OURS))
    assert not whereabouts._place(stack_of(*inner), True).is_waiting


def test_an_error_is_placed_where_its_first_cause_was_raised():
    def fails() -> None:
        raise KeyError("w1")

    def translates() -> None:
        try:
            fails()
        except KeyError as error:
            raise ValueError("weights") from error

    with pytest.raises(ValueError) as caught:
        translates()
    assert place_of_error(caught.value).call.startswith("fails (test_whereabouts.py:")
