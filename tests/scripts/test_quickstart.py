"""What the scripts say on a machine that lacks something, and (--full) the quickstart from end to end."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("bash", "sed", "cat", "cksum", "cut", "sort", "head", "grep", "dirname", "touch")


@pytest.fixture
def machine(tmp_path):
    """A folder with the scripts, and a PATH with a shell, a compiler and a Python that a test can replace."""
    project, commands = tmp_path / "project", tmp_path / "bin"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copyfile(ROOT / name, project / name)
    commands.mkdir()
    for name in COMMANDS:
        (commands / name).symlink_to(shutil.which(name))
    (commands / "python3").symlink_to(sys.executable)
    _script(commands / "g++", "exit 0")
    return project, commands


def _script(path: Path, body: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


def _run(machine, script: str) -> subprocess.CompletedProcess:
    project, commands = machine
    environment = {"PATH": str(commands), "HOME": str(project)}
    return subprocess.run([commands / "bash", project / "scripts" / script], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_a_machine_without_venv(machine, script):
    _script(machine[1] / "python3", f'case "$*" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"')
    result = _run(machine, script)
    assert (result.returncode, result.stderr) == (2, "error: Python's venv module is missing: apt-get install python3-venv\n")


def test_a_machine_without_a_compiler(machine):
    (machine[1] / "g++").unlink()
    result = _run(machine, "quickstart.sh")
    assert (result.returncode, result.stderr) == (2, "error: no C++ compiler: apt-get install g++\n")


def test_a_machine_without_python(machine):
    (machine[1] / "python3").unlink()
    result = _run(machine, "quickstart.sh")
    assert (result.returncode, result.stderr) == (2, "error: python3 is not installed: apt-get install python3\n")


def test_an_old_python(machine):
    _script(machine[1] / "python3", 'case "$*" in *version_info*) exit 1;; --version) echo Python 3.9.2;; esac')
    result = _run(machine, "quickstart.sh")
    assert (result.returncode, result.stderr) == (2, "error: python3 is Python 3.9.2: Python 3.11 or later is needed\n")


@pytest.mark.parametrize(
    "installed, kept", [("2.11.0+cu128", True), ("2.13.0", True), ("2.12.1", True), ("2.10.0", False), ("1.13.1", False), ("", False)]
)
def test_which_torch_is_kept(machine, installed, kept):
    project, _ = machine
    (project / ".venv" / "bin").mkdir(parents=True)
    functions = (project / "scripts" / "_setup.sh").read_text().rpartition("\nsetup ")[0]
    command = f"{functions}\nfits '{installed}' && echo kept || echo replaced"
    result = subprocess.run(["bash", "-c", command], cwd=project, capture_output=True, text=True)
    assert result.stdout == ("kept\n" if kept else "replaced\n")


@pytest.mark.full
def test_from_nothing_to_text():
    """In this checkout's runs/quickstart, with the interpreter that runs the tests; what is there already is not made again."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHON": sys.executable}
    result = subprocess.run(["bash", ROOT / "scripts" / "quickstart.sh"], env=environment, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    loss, entropy = (float(re.search(rf"{name}\D+([\d.]+)", result.stdout)[1]) for name in ("held-out loss, nats", "unigram entropy of"))
    assert loss < 0.6 * entropy
    assert (ROOT / "runs" / "quickstart" / "loss.png").stat().st_size > 10_000
