"""Training a classifier by the command line; fine-tuning is in tests/curation/classifiers/test_pretrained.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llama3.curation.classifiers.model_file import load_classifier
from tests.curation.blocks.test_quality import write_records
from tests.curation.classifiers.models import examples

TOOL = Path(__file__).parents[2] / "tools" / "train_quality.py"


@pytest.mark.slow
def test_the_tool_trains_from_a_judges_file(tmp_path):
    texts, labels = examples(60, 0)
    judged = write_records(tmp_path / "judged.jsonl", [{"text": t, "score": 4 if n == "good" else 1} for t, n in zip(texts, labels)])
    command = [sys.executable, TOOL, "--judgements", judged, "--min-score", "3", "--output", tmp_path / "model.npz"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "held out: " in result.stdout
    assert "area under the ROC curve" in result.stdout
    assert load_classifier(tmp_path / "model.npz").config.labels == ["bad", "good"]
    refused = subprocess.run([*command[:5], "9", *command[6:-1], tmp_path / "none.npz"], capture_output=True, text=True)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "give at least 10 of two classes" in refused.stderr
    assert not (tmp_path / "none.npz").exists()
