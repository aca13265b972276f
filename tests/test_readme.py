"""What the README says of the project is so: paths, figures, sizes, where tests stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_llama3"


def test_every_path_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"(?:tests|tools|examples|scripts|benchmarks|docs)/[\w./-]*\w", text)
    named += [f"megatron_llama3/{path}" for path in re.findall(r"`((?:[a-z_]+/)+(?:[\w.]+\.py)?)`", text) if not (ROOT / path).exists()]
    assert len(named) > 40
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert not missing


def test_every_figure_of_the_quickstarts_output_is_in_the_results():
    readme, results = ((ROOT / path).read_text() for path in ("README.md", "benchmarks/RESULTS.md"))
    output = re.search(r"```\n(iteration 680.*?)\n\n", readme, re.DOTALL)[1]
    figures = re.findall(r"\d+\.\d+|\d+%|\d+(?= characters|$)", output, re.MULTILINE)
    assert len(figures) == 12
    assert [figure for figure in figures if figure not in results] == []


def lines_of(*patterns: str) -> int:
    return sum(len(path.read_text().splitlines()) for pattern in patterns for path in PACKAGE.glob(pattern))


def test_the_spine_is_as_long_as_said():
    said = re.search(r"([\d,]+) of\s+its ([\d,]+) lines", (ROOT / "README.md").read_text())
    spine, whole = (int(number.replace(",", "")) for number in said.groups())
    assert lines_of("recipes/pretrain.py", "training/**/*.py", "model/**/*.py", "parallel/**/*.py") == pytest.approx(spine, rel=0.15)
    assert lines_of("**/*.py") == pytest.approx(whole, rel=0.15)


def test_as_many_blocks_of_curation_as_said():
    blocks = re.search(r"BLOCKS = \{(.*?)\n\}", (PACKAGE / "curation" / "pipeline.py").read_text(), re.DOTALL)[1]
    assert f"YAML of {blocks.count(':') // 2} blocks" in (ROOT / "README.md").read_text()


def test_the_tests_of_a_module_stand_at_its_path():
    modules = {path.stem: path.relative_to(PACKAGE).parent for path in PACKAGE.glob("**/*.py")}
    del modules["equivalence"]  # what it compares is tests/training's matter
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob("**/test_*.py")]
    assert sum((PACKAGE / test.parent / test.name.removeprefix("test_")).exists() for test in tests) > 60
    for test in tests:
        folder, module = test.parent, test.stem.removeprefix("test_")
        if folder.parts and (PACKAGE / folder.parts[0]).is_dir():
            assert (PACKAGE / folder).is_dir(), f"tests/{test}: the package has no such folder"
            stands = module not in modules or (PACKAGE / folder / f"{module}.py").exists()
            assert stands, f"tests/{test}: {module}.py is in {modules[module]}"
