"""The Dockerfile names files that are there, and a Python that the project allows. No container engine is needed, and none is used."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "Dockerfile").read_text().splitlines()


def test_what_it_copies_is_there():
    copied = [line.split()[1] for line in LINES if line.startswith("COPY ")]
    assert copied == ["requirements.txt", "."]  # the requirements first: a change of the code does not install them again
    assert (ROOT / "requirements.txt").exists()


def test_its_python_is_one_that_the_project_allows():
    minor = int(re.search(r"^ARG BASE=python:3[.](\d+)-slim$", "\n".join(LINES), re.MULTILINE)[1])
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert minor >= int(wanted.removeprefix(">=3."))


def test_what_git_ignores_stays_out_of_the_image():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    assert {".venv", "data", "runs", "wandb", "build"} <= ignored & set((ROOT / ".dockerignore").read_text().split())
