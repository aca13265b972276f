"""What the README names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_path_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"(?:tests|tools|examples|scripts|benchmarks|docs)/[\w./-]*\w", text)
    named += [f"megatron_llama3/{path}" for path in re.findall(r"`((?:[a-z_]+/)+(?:[\w.]+\.py)?)`", text) if not (ROOT / path).exists()]
    assert len(named) > 40
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert not missing
