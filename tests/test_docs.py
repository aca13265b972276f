"""What docs/ tell a newcomer to type is accepted: the YAML, every flag, every link."""

import re
from pathlib import Path

import pytest

from megatron_llama3.config.command_line import build_parser, parse_run_config

ROOT = Path(__file__).parents[1]
DOCS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
OTHER_PROGRAMS = {"--quick", "--full", "--from", "--to", "--standalone", "--nproc-per-node", "--help"}


def test_the_yaml_of_the_training_page_is_a_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    text = (ROOT / "docs" / "training.md").read_text()
    path = tmp_path / "run.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    config = parse_run_config(["--config", str(path), "--dry-run"])
    assert (config.training.train_iters, config.checkpoint.auto_resume) == (60, True)


@pytest.mark.parametrize("page", ["training.md", "coming_from.md", "parallelism.md"])
def test_every_flag_named_on_a_page_exists(page):
    text = (ROOT / "docs" / page).read_text()
    if page == "coming_from.md":  # the left column is another program's
        text = "\n".join(line.split("|")[2] for line in text.splitlines() if line.startswith("|"))
    known = set(build_parser()._option_string_actions) | OTHER_PROGRAMS
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    assert len(flags) > 8
    assert sorted(flags - known) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
