"""docs/curation.md has every block as the code has it, and its examples are pipelines."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from megatron_llama3.curation.block_docs import block_reference, with_reference
from megatron_llama3.curation.pipeline import BLOCKS, block_class_of, block_parameters, load_pipeline

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "curation.md"


def test_the_document_has_what_the_code_says():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_reference(text) == text, "python -m megatron_llama3.curation.block_docs --write docs/curation.md"


def test_every_block_key_and_default_is_in_it():
    reference = block_reference()
    assert re.findall(r"^### `(\w+)`$", reference, re.MULTILINE) == list(BLOCKS)
    assert "`{threshold: 0.72, ngram: 5, bands: 32, rows: 8, within: null, seed: 1}`" in reference
    assert "`{model: NEEDED, min_score: 0.5, label: good, batch_size: 64}`" in reference
    assert "exclusion_writer" not in reference
    assert "- `within`: a metadata key" in reference


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - {"gopher_quality", "gopher_repetition", "c4_quality", "fineweb_quality"}))
def test_every_key_is_explained(name):
    block_class = block_class_of(name)
    missing = [key for key in block_parameters(block_class) if not re.search(rf"\b{key}\b", block_class.__doc__)]
    assert missing == []


def test_its_yaml_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "How many loaves are left when two of the three are sold?"}\n')
    found = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 3
    whole, block, executors = map(yaml.safe_load, found)
    for pipeline in (whole, {**whole, "blocks": block}, {**whole, **executors}):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(pipeline))
        assert load_pipeline(str(tmp_path / "p.yaml")).blocks


@pytest.mark.parametrize("name", ["c4_quality: {language: de}", "quality: {model: none.npz, exclusion_writer: x}"])
def test_what_is_not_in_it_is_refused(tmp_path, name):
    from megatron_llama3.config.errors import UserError

    (tmp_path / "p.yaml").write_text(f"input: {{path: x}}\nblocks:\n- {name}\n")
    with pytest.raises(UserError, match="unknown argument"):
        load_pipeline(str(tmp_path / "p.yaml"))


def test_the_tests_install_what_curation_needs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = {*extras["test"], *(ROOT / "requirements.txt").read_text().splitlines()}
    assert set(extras["curation"]) - installed == set()
