"""The mutation score: how many small faults in the source the tests notice. Needs minutes to hours, so no test starts it.

    python -m tests.mutation.run --count 300 --seed 1 --results DIR [--part near | default] [--only training/stop] [--share 1/2]
    python -m tests.mutation.run --results OTHER --survivors-of DIR
    python -m tests.mutation.run --results DIR --report

One process imports what the tests import, but nothing of ours, and forks a child for each mutant and stage, which runs pytest at once in a
copy of the working tree that holds the mutant; processes that the tests start see the same copy. Tests that have killed in the same file
come first, then the mirrored file, those that import the module, its folder and the rest that can reach it. A test that fails also without
the mutant is left out. What is in DIR is not run again: a killed run goes on, and `--part default` takes what the quick part let live.
`--part near` has the quick tests of the mirrored file and of those that import the module alone: seconds a mutant, while one writes them.

A kill by a failed assertion is a kill by value. After an exception the near tests go on for some seconds, in search of an assertion that
fails as well. Without one, "crash" says that the mutated line stands in the exception's traceback: such a mutant does not run through, and
no assertion could see its value.
"""

import argparse
import ast
import ctypes
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.mutation.mutants import Mutant, mutants_of, sample

ROOT = Path(__file__).parents[2]
OURS = ("megatron_llama3", "tests", "tools", "benchmarks")
MUTATED = ("parallel/*", "model/*", "training/*", *(f"data/{name}" for name in ("packing", "loader", "blend")),
           *(f"checkpoint/{name}" for name in ("store", "compatibility")))  # fmt: skip
QUICK = "not slow and not full and not cuda"
MARKS = {"near": QUICK, "quick": QUICK, "default": "slow and not full and not cuda"}
SECONDS_A_TEST = {"near": 90.0, "quick": 90.0, "default": 300.0}
SECONDS_FOR_A_VALUE = 20.0
"""how long tests go on after an exception, in search of a failed assertion"""
STARTS_PROGRAMS = ("tools", "scripts", "recipes", "examples")  # folders of tests that reach modules without importing them
KINDS = ("assertion", "exception", "crash", "time-out")
FORK = multiprocessing.get_context("fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True, help="folder of the results, JSON lines")
    parser.add_argument("--part", choices=MARKS, default="quick", help="tests to run; `default` on what survived `quick`")
    parser.add_argument("--only", default="", help="part of the path of files to mutate")
    parser.add_argument("--share", default="1/1", help="K/N: every N-th mutant from the K-th on, for N runs side by side")
    parser.add_argument("--survivors-of", type=Path, help="instead of a sample: what lives in that folder, on the code as it is")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    if not arguments.report:
        with tempfile.TemporaryDirectory(prefix="mut-") as folder:
            server = Server(Path(folder))
            run(server, drawn_from(server.tree, arguments), arguments.part, results)
    print(results.report())


def drawn_from(root: Path, arguments: argparse.Namespace) -> list[Mutant]:
    """Of the server's copy: the working tree may change while mutants run."""
    share, of = map(int, arguments.share.split("/"))
    paths = [path for path in mutated_files(root) if arguments.only in path]
    mutants = [mutant for path in paths for mutant in mutants_of(path, (root / path).read_text())]
    if arguments.survivors_of is None:
        return sample(mutants, arguments.count, arguments.seed)[share - 1 :: of]
    return found_again(mutants, Results(arguments.survivors_of).living(), root)[share - 1 :: of]


def mutated_files(root: Path) -> list[str]:
    paths = [path for pattern in MUTATED for path in (root / "megatron_llama3").glob(f"{pattern}.py")]
    return sorted(str(path.relative_to(root)) for path in paths)


def found_again(mutants: list[Mutant], names: list[str], root: Path) -> list[Mutant]:
    """The mutants of these names in code that may have moved by some lines."""

    def without_place(name: str) -> str:
        return re.sub(r"\n@@ .* @@", "", name)

    by_name = {without_place(name_of(mutant, root)): mutant for mutant in reversed(mutants)}
    return [by_name[key] for key in map(without_place, names) if key in by_name]


def name_of(mutant: Mutant, root: Path) -> str:
    return f"{mutant.path}: {mutant.operator}\n{mutant.diff((root / mutant.path).read_text())}"


def run(server: "Server", drawn: list[Mutant], part: str, results: "Results") -> None:
    for mutant in drawn:
        name = name_of(mutant, server.tree)
        if results.is_open(name, part):
            start = time.monotonic()
            kill = server.judge(mutant, part, results.killers(mutant.path)) or {"test": None, "kind": None}
            seconds = round(time.monotonic() - start)
            results.add({"mutant": name, "path": mutant.path, "operator": mutant.operator, "part": part, "seconds": seconds} | kill)


class Results:
    """One line a mutant and part: mutant, path, operator, part, test (None: it lives), kind, seconds."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "mutants.jsonl"

    def add(self, record: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(record["mutant"], f"-> {record['kind'] or 'LIVES'} {record['test'] or ''} {record['seconds']} s", sep="\n", flush=True)

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def is_open(self, name: str, part: str) -> bool:
        of_it = {record["part"]: record for record in self.records() if record["mutant"] == name}
        has_lived = all(record["kind"] is None for record in of_it.values())
        return part not in of_it and has_lived and (part != "default" or "quick" in of_it)

    def killers(self, path: str) -> list[str]:
        """Tests that have killed mutants of the same file, the most deadly first."""
        return [test for test, _ in Counter(r["test"] for r in self.records() if r["path"] == path and r["kind"]).most_common(8)]

    def last(self) -> dict[str, dict]:
        """By mutant; a kill, where there is one."""
        records = self.records()
        return {record["mutant"]: record for record in (*records, *(record for record in records if record["kind"]))}

    def living(self) -> list[str]:
        return [name for name, record in self.last().items() if not record["kind"]]

    def report(self) -> str:
        last = self.last()
        by_package = defaultdict(Counter)
        for record in last.values():
            for package in (Path(record["path"]).parent.name, "all"):
                by_package[package].update(["mutants", record["kind"] or "lives"])
                by_package[package]["killed by quick"] += bool(record["kind"]) and record["part"] != "default"
        columns = ["mutants", "killed by quick", *KINDS, "lives"]
        lines = [f"| package | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(str(counts[c]) for c in columns)} |" for name, counts in by_package.items()]
        return "\n".join([*lines, "", *self.living()])


class Server:
    """Forks children that run tests in a copy of the working tree."""

    def __init__(self, folder: Path):
        self.folder, self.tree, self.temporary = folder, folder / "tree", folder / "t"
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        for name in filter(None, files):
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.tree / name)
        (self.tree / ".venv").symlink_to((ROOT / ".venv").resolve())
        self.test_files = sorted(str(path.relative_to(self.tree)) for path in self.tree.glob("tests/**/test_*.py"))
        self.reached = {test: reached_modules(self.tree, test) for test in self.test_files}
        self.trusted, self.left_out = set(), set()
        _adopt_orphans()
        self._warm_up()

    def judge(self, mutant: Mutant, part: str, killers: list[str]) -> dict | None:
        """{test, kind} of a test of the part that fails with the mutant and passes without it, if possible by an assertion; or None."""
        path = self.tree / mutant.path
        source = path.read_text()
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
            cached.unlink()  # children write none, so the file is always compiled
        near, far = self._files(mutant.path)
        kill = None
        for tests in ([test for test in killers if test.partition("::")[0] in self.test_files], near, far if part != "near" else []):
            if kill is None or (kill["kind"] == "exception" and tests is not far):
                kill = self._kill_by(mutant, path, source, tests, part) or kill
        lines = kill.pop("lines", []) if kill else []
        if kill and kill["kind"] == "exception" and any(f"{mutant.path}:{line}" in lines for line in mutant.statement_lines(source)):
            kill["kind"] = "crash"
        return kill

    def _kill_by(self, mutant: Mutant, path: Path, source: str, tests: list[str], part: str) -> dict | None:
        while True:
            path.write_text(mutant.apply(source))
            kill = self._failure(tests, part)
            path.write_text(source)
            if kill is None or self._passes(kill["test"], part):
                return kill

    def _failure(self, tests: list[str], part: str) -> dict | None:
        """The first failed assertion, or the first other failure if none follows it soon."""
        failures: list[dict] = []

        def seconds_left(failure: dict) -> float:
            failures.append(failure)
            return SECONDS_FOR_A_VALUE if failure["kind"] == "exception" else 0.0

        if tests:
            flags = [f"--deselect={test}" for test in self.left_out]
            self._in_child(lambda report: _pytest(report, MARKS[part], tests, flags), SECONDS_A_TEST[part], seconds_left)
        return next((failure for failure in failures if failure["kind"] == "assertion"), failures[0] if failures else None)

    def _passes(self, test: str, part: str) -> bool:
        """Without a mutant; tried once."""
        if test not in self.trusted and test not in self.left_out:
            (self.left_out if self._failure([test], part) else self.trusted).add(test)
        return test in self.trusted

    def _files(self, path: str) -> tuple[list[str], list[str]]:
        """Test files that can reach a module: near ones (the mirrored file, then those that import it), then the others."""
        _, package, name = Path(path).parts
        module = path.removesuffix(".py").replace("/", ".")
        mirrored = f"tests/{package}/test_{name}"
        importing = [test for test in self.test_files if module in imported_modules(self.tree / test)]
        near = [test for test in self.test_files if test == mirrored] + [test for test in importing if test != mirrored]
        far = [test for test in self.test_files if test not in near and (module in self.reached[test] or _starts_programs(test))]
        closeness = {package: 0, "training": 1, "model": 2, "parallel": 2}
        return near, sorted(far, key=lambda test: (closeness.get(Path(test).parts[1], 3), _starts_programs(test), test))

    def _warm_up(self) -> None:
        """Imports here what the tests import, apart from ours; the child that finds out leaves compiled files for the others."""
        names: list[str] = []

        def collect(report: Callable[[object], None]) -> None:
            _pytest(lambda kill: None, "", self.test_files, ["--collect-only"], is_cached=True)
            report([name for name in list(sys.modules) if name.partition(".")[0] not in OURS])

        self._in_child(collect, 600.0, names.extend)
        for name in names:
            with suppress(Exception):
                importlib.import_module(name)

    def _in_child(self, function: Callable, patience: float, on_message: Callable) -> None:
        """`function(report)` in a fork inside the tree. A reported string says that it goes on; silent for `patience` s, it is a time-out.

        `on_message` gets what else is reported, and may return the seconds after which the child is ended.
        """
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(exist_ok=True)  # a killed test may have left a mount there
        receive, send = FORK.Pipe(duplex=False)
        child = FORK.Process(target=self._child_main, args=(function, send))
        child.start()
        send.close()
        current, end = None, math.inf
        while receive.poll(max(0.0, min(patience, end - time.monotonic()))):
            try:
                message = receive.recv()
            except EOFError:
                break
            if isinstance(message, str):
                current = message
            else:
                seconds = on_message(message)
                end = end if seconds is None else min(end, time.monotonic() + seconds)
        else:
            if end == math.inf:
                on_message({"test": current, "kind": "time-out"})
        _end_all_children()
        child.join()

    def _child_main(self, function: Callable, pipe) -> None:
        os.setsid()
        os.chdir(self.tree)
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(log, number)
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        sys.path[:] = [str(self.tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
        os.environ |= {"PYTHONPATH": str(self.tree), "TMPDIR": str(self.temporary)}
        tempfile.tempdir = None
        function(pipe.send)
        os._exit(0)


class _Reporter:
    """A pytest plugin: sends each test's name when it starts, and what failed, how, and the lines of ours in its traceback."""

    def __init__(self, report: Callable[[object], None]):
        self.report = report

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.report(nodeid)

    def pytest_exception_interact(self, node, call) -> None:
        error = call.excinfo.value
        self.report({"test": node.nodeid, "kind": kind_of_kill(error), "lines": lines_of_ours(error)})


def lines_of_ours(error: BaseException) -> list[str]:
    """As megatron_llama3/model/loss.py:12; also those in a rank's traceback, which the error carries."""
    found = re.findall(r'File "[^"\n]*?(megatron_llama3/[^"\n]+)", line (\d+)', "".join(traceback.format_exception(error)))
    return [f"{path}:{line}" for path, line in found]


def kind_of_kill(error: BaseException) -> str:
    """A failed assertion, also one in a rank whose traceback the error carries; else an exception or a time-out."""
    if re.search(r"did not finish in time|TimeoutExpired", f"{type(error).__name__} {error}"):
        return "time-out"
    is_assertion = isinstance(error, AssertionError) or type(error).__name__ == "Failed"
    raised = re.findall(r"^(?:E +)?([\w.]*(?:Error|Exception|Interrupt))\b", str(error), re.MULTILINE) if "Traceback" in str(error) else []
    return "assertion" if is_assertion and (not raised or raised[-1].endswith("AssertionError")) else "exception"


def imported_modules(path: Path) -> set[str]:
    """Modules named by the imports anywhere in a file, as megatron_llama3.model.loss."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reached_modules(root: Path, test: str) -> set[str]:
    """Our modules that a test file imports, and those that these import."""
    reached, ahead = set(), [root / test, *(root / folder / "conftest.py" for folder in ("tests", Path(test).parent))]
    while ahead:
        path = ahead.pop()
        for module in (imported_modules(path) if path.is_file() else set()) - reached:
            if module.partition(".")[0] in OURS:
                reached.add(module)
                ahead.append(root / (module.replace(".", "/") + ".py"))
    return reached


def _starts_programs(test: str) -> bool:
    return Path(test).parts[1] in STARTS_PROGRAMS


def _pytest(report: Callable[[object], None], marks: str, tests: list[str], flags: list[str], is_cached: bool = False) -> None:
    sys.dont_write_bytecode = not is_cached
    import pytest

    pytest.main(["-q", "-p", "no:cacheprovider", "-m", marks, *flags, *tests], plugins=[_Reporter(report)])


def _adopt_orphans() -> None:
    """Processes whose parent ends become children of this one, which can end them."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def _end_all_children() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
            process.wait(10)


if __name__ == "__main__":
    main()
