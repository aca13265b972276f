"""What `pip install .` gives: every module and data file in the wheel, and a command for each recipe and tool that works in any folder."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
OF_THE_QUICKSTART = {"quickstart_corpus", "quickstart_report"}  # of no use without scripts/quickstart.sh
FOLDERS = {"megatron_llama3": "megatron_llama3", "megatron_llama3_tools": "tools"}


def file_of(module: str) -> Path:
    package, _, rest = module.partition(".")
    return ROOT / FOLDERS[package] / f"{rest.replace('.', '/')}.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_named_as_its_file_is(command):
    module, _, function = COMMANDS[command].partition(":")
    assert command == "llama3-" + module.removesuffix(".__main__").rpartition(".")[2].replace("_", "-")
    assert function in {node.name for node in ast.parse(file_of(module).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_tool_has_a_command():
    tools = {path.stem for path in (ROOT / "tools").glob("[!_]*.py")} - OF_THE_QUICKSTART
    assert {f"megatron_llama3_tools.{tool}:command" for tool in tools} <= set(COMMANDS.values())


def test_examples_that_help_shows_keep_their_lines():
    """A backslash at the end of a line of an ordinary string joins it to the next."""
    for path in (ROOT / "tools").glob("[!_]*.py"):
        shown = ast.get_docstring(ast.parse(path.read_text()), clean=False)
        assert max(map(len, shown.splitlines())) <= 140, path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools leaves its files beside what it builds."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", source.parent, source], check=True)
    return next(source.parent.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with bin/ of what pip installs from the wheel."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    subprocess.run([*pip, wheel], check=True)
    return target


@pytest.mark.slow
def test_every_file_of_the_two_packages_is_in_the_wheel(wheel):
    here = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert there == here


@pytest.mark.slow
def test_the_commands_work_in_any_folder(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(command: str, *flags: str) -> str:
        done = subprocess.run([installed / "bin" / command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    assert sorted(path.name for path in (installed / "bin").iterdir()) == sorted(COMMANDS)
    for command in COMMANDS:
        assert run(command, "--help").startswith(f"usage: {command} ")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "from any folder " * 20}) + "\n")
    run("llama3-train-tokenizer", "--input", "a.jsonl", "--vocab-size", "514", "--output", "tokenizer")
    run("llama3-preprocess-data", "--input", "a.jsonl", "--output-prefix", "a", "--tokenizer-model", "tokenizer", "--append-eod")
    assert "a_text_document" in run("llama3-inspect-dataset", "a_text_document")
