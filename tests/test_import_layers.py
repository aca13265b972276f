"""The house's lint rules: packages read only from those above them, and what must start fast imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_llama3"
ORDER = [
    *["config", "parallel", "model", "tokenizer", "data", "curation"],
    *["training", "checkpoint", "inference", "planning", "recipes"],
]
FAST = ["config.command_line", "planning.estimate", "recipes.pretrain", "tokenizer.llama3", "data.loader", "data.preprocess"]


def imported_modules(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            modules.append(node.module)
    return modules


def test_the_order_is_of_the_packages_that_there_are():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_package_reads_only_from_those_above_it(path):
    layer = path.relative_to(PACKAGE).parts[0]
    assert layer in ORDER
    for module in imported_modules(path):
        if module.startswith("megatron_llama3."):
            read = module.split(".")[1]
            assert ORDER.index(read) <= ORDER.index(layer), f"{path.name} in {layer} imports {module}"
            assert layer != "config" or read == "config", f"config imports {module}"


@pytest.mark.parametrize("module", FAST)
def test_no_torch_where_a_start_must_be_fast(module):
    code = f"import sys, megatron_llama3.{module}; sys.exit(bool({{'torch', 'megatron.core'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
