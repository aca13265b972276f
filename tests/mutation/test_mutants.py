"""What the mutation runner makes of a file, how it draws, and how it names a kill."""

import subprocess

import pytest

from megatron_llama3.parallel.topology import Topology
from megatron_llama3.planning.local_ranks import RankFailedError
from tests.mutation import run
from tests.mutation.mutants import mutants_of, sample
from tests.mutation.run import ROOT, Results, imported_modules, kind_of_kill, lines_of_ours, mutated_files, reached_modules

SOURCE = '''"""Not this 1."""
LIMIT = 3


@decorated(1)
def f(a: "1", b=2) -> int:
    """Nor this 1."""
    if a < b and not b:
        raise ValueError(f"{a + 1} ü")
    self.x = g(a, min(b, 1), key=True) - a * 2
    return [x.to(a) for x in b if x is None]
'''
EXPECTED = {
    2: {"LIMIT = 4", "LIMIT = 2"},
    8: {"if (a <= b) and not b:", "if (a < b or not b):", "if a < b and (b):", "if (not (a < b and (not b))):"},
    9: {"pass"},
    10: {
        *("pass", "self.x = (g(a, min(b, 1), key=True) + a * 2)", "self.x = g(a, min(b, 1), key=True) - (a / 2)"),
        *("self.x = (g(min(b, 1), a, key=True)) - a * 2", "self.x = (g(a, min(b, 1))) - a * 2"),
        "self.x = g(a, (max)(b, 1), key=True) - a * 2",  # and not min(1, b), which is the same
        *("self.x = g(a, min(b, 2), key=True) - a * 2", "self.x = g(a, min(b, 0), key=True) - a * 2"),
        "self.x = g(a, min(b, 1), key=False) - a * 2",
        *("self.x = g(a, min(b, 1), key=True) - a * 3", "self.x = g(a, min(b, 1), key=True) - a * 1"),
    },
    11: {
        *("return [(x) for x in b if x is None]", "return [x.to(a) for x in b if (x is not None)]"),
        "return [x.to(a) for x in b if (not (x is None))]",
    },
}


def test_mutants_of_each_line():
    found: dict[int, set[str]] = {}
    for mutant in mutants_of("a.py", SOURCE):
        removed, added = SOURCE.splitlines(), mutant.apply(SOURCE).splitlines()
        (changed,) = [number for number, (old, new) in enumerate(zip(removed, added), 1) if old != new]
        assert changed == mutant.line
        found.setdefault(mutant.line, set()).add(added[changed - 1].strip())
    assert found == EXPECTED


def test_a_mutants_text_is_placed_right_behind_letters_of_several_bytes():
    source = 'x = "ü"; y = 1\n'
    assert {mutant.apply(source) for mutant in mutants_of("a.py", source)} == {'x = "ü"; y = 2\n', 'x = "ü"; y = 0\n'}


def test_a_sample_is_of_lines_and_of_the_seed_alone():
    mutants = mutants_of("a.py", SOURCE)
    drawn = sample(mutants, 4, seed=1)
    assert drawn == sample(list(mutants), 4, seed=1)
    assert len({mutant.line for mutant in drawn}) == 4
    assert {tuple(sample(mutants, 4, seed)) for seed in range(5)} != {tuple(drawn)}
    assert len(sample(mutants, 300, seed=1)) == 5


def test_the_files_that_are_mutated():
    paths = mutated_files(ROOT)
    assert {path.split("/")[1] for path in paths} == {"parallel", "model", "training", "data", "checkpoint"}
    assert [path for path in paths if "/data/" in path or "/checkpoint/" in path] == [
        *(f"megatron_llama3/checkpoint/{name}.py" for name in ("compatibility", "store")),
        *(f"megatron_llama3/data/{name}.py" for name in ("blend", "loader", "packing")),
    ]


@pytest.mark.parametrize("error, kind", [
    (AssertionError("assert 1 == 2"), "assertion"),
    (pytest.fail.Exception("DID NOT RAISE"), "assertion"),
    (RuntimeError("shape"), "exception"),
    (RankFailedError("rank 1:\nTraceback (most recent call last):\n  File x\nAssertionError: 1 != 2"), "assertion"),
    (RankFailedError("rank 1:\nTraceback (most recent call last):\n  File x\nRuntimeError: shape"), "exception"),
    (AssertionError("assert 1 == 0\nTraceback (most recent call last):\n  File x\nKeyError: 'a'"), "exception"),
    (RankFailedError("ranks [0] did not finish in time"), "time-out"),
    (subprocess.TimeoutExpired("torchrun", 60), "time-out"),
])  # fmt: skip
def test_kinds_of_kill(error, kind):
    assert kind_of_kill(error) == kind


def test_where_a_traceback_may_place_a_mutant():
    source = "with a(\n    1,\n    2):\n    b(3,\n      4)\n    c(5)\n"
    lines = {mutant.line: [*mutant.statement_lines(source)] for mutant in mutants_of("a.py", source)}
    assert lines == {1: [1, 2, 3], 2: [1, 2, 3], 3: [1, 2, 3], 4: [4, 5], 5: [4, 5], 6: [6]}


def test_the_lines_of_a_traceback_also_of_a_ranks():
    text = 'rank 1:\nTraceback:\n  File "/tmp/t/megatron_llama3/model/loss.py", line 12, in f\n  File "/x/a.py", line 3, in g\nTypeError: x'
    assert lines_of_ours(RankFailedError(text)) == ["megatron_llama3/model/loss.py:12"]
    with pytest.raises(AttributeError) as caught:
        Topology().group_ranks(0, "no such axis")
    assert [line.split(":")[0] for line in lines_of_ours(caught.value)] == 2 * ["megatron_llama3/parallel/topology.py"]


def test_a_killed_run_goes_on_and_the_default_part_takes_what_lives(tmp_path, capsys):
    results = Results(tmp_path)
    common = {"operator": "constant", "seconds": 1}
    for name, test, kind, part in (
        ("a", "t.py::one", "assertion", "quick"), ("b", None, None, "quick"), ("c", None, None, "quick"),
        ("c", "t.py::slow", "exception", "default"), ("d", "t.py::one", "time-out", "quick"),
    ):  # fmt: skip
        results.add(common | {"mutant": name, "path": "megatron_llama3/model/x.py", "part": part, "test": test, "kind": kind})
    again = Results(tmp_path)
    assert [name for name in "abcde" if again.is_open(name, "quick")] == ["e"]
    assert [name for name in "abcde" if again.is_open(name, "near")] == ["b", "e"]
    assert [name for name in "abcde" if again.is_open(name, "default")] == ["b"]
    assert again.killers("megatron_llama3/model/x.py") == ["t.py::one", "t.py::slow"]
    assert again.report().splitlines() == [
        "| package | mutants | killed by quick | assertion | exception | crash | time-out | lives |", "|---" * 8 + "|",
        "| model | 4 | 2 | 1 | 1 | 0 | 1 | 1 |", "| all | 4 | 2 | 1 | 1 | 0 | 1 | 1 |", "", "b",
    ]  # fmt: skip


def test_survivors_are_found_again_where_lines_have_moved(tmp_path):
    source = "a = 1\nb = 1\n"
    (tmp_path / "a.py").write_text(source)
    before = [run.name_of(mutant, tmp_path) for mutant in mutants_of("a.py", source)]
    (tmp_path / "a.py").write_text("\n\n" + source.replace("b", "c"))
    now = mutants_of("a.py", (tmp_path / "a.py").read_text())
    assert [(mutant.line, mutant.text) for mutant in run.found_again(now, before, tmp_path)] == [(3, "0"), (3, "2")]


def test_modules_that_a_test_reaches_by_its_imports_and_theirs():
    assert "megatron_llama3.model.loss" in imported_modules(ROOT / "tests/model/test_loss.py")
    reached = reached_modules(ROOT, "tests/model/test_loss.py")
    assert "megatron_llama3.parallel.collectives" in reached, "through tensor_parallel"
    assert "megatron_llama3.checkpoint.store" not in reached
