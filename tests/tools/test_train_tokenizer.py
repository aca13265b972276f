"""tools/train_tokenizer.py: what it writes, its report, its refusals."""

import subprocess
import sys

import pytest

from megatron_llama3.tokenizer.llama3 import load_tokenizer
from tests.tokenizer.texts import CODE, SENTENCES
from tests.tools.preprocess_helpers import ENVIRONMENT, ROOT, write_jsonl


def _train(*flags):
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT)


@pytest.fixture
def corpus(tmp_path):
    write_jsonl(tmp_path / "code.jsonl", list(CODE.values()) * 3)
    (tmp_path / "thai.txt").write_text(SENTENCES["thai"] * 5)
    return tmp_path


def test_training_and_extending(corpus):
    done = _train("--input", corpus / "code.jsonl", "--vocab-size", 600, "--output", corpus / "base", "--report", f"thai={corpus}/thai.txt")
    assert done.returncode == 0, done.stderr
    assert "characters per token" in done.stdout
    base = load_tokenizer(corpus / "base")
    assert base.vocab_size == 600
    assert f"{len(SENTENCES['thai']) / len(base.encode(SENTENCES['thai'])):.2f}" in done.stdout
    flags = ["--extend", corpus / "base", "--add", 20, "--report", f"thai={corpus}/thai.txt", f"code={corpus}/code.jsonl"]
    done = _train("--input", corpus / "thai.txt", "--output", corpus / "extended", *flags)
    assert done.returncode == 0, done.stderr
    extended = load_tokenizer(corpus / "extended" / "tokenizer.json")
    assert extended.vocab_size == 620
    assert extended.ranks.items() >= base.ranks.items()
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in done.stdout.splitlines()[2:]}
    assert rows["thai"][1] > rows["thai"][0]
    assert rows["code"][1] == rows["code"][0]


@pytest.mark.parametrize("flags, message", [
    (["--input", "absent.jsonl", "--vocab-size", "600"], "absent.jsonl"),
    (["--input", "{tmp}/code.jsonl", "--vocab-size", "100"], "at least 512"),
    (["--input", "{tmp}/code.jsonl", "--vocab-size", "90000"], "yields only"),
    (["--input", "{tmp}/code.jsonl", "--vocab-size", "600", "--json-key", "body"], "code.jsonl line 1: missing key 'body'"),
    (["--input", "{tmp}/code.jsonl"], "--vocab-size"),
    (["--input", "{tmp}/code.jsonl", "--vocab-size", "600", "--report", "thai"], "NAME=PATH"),
])  # fmt: skip
def test_what_cannot_be_done(corpus, flags, message):
    done = _train("--output", corpus / "out", *[flag.format(tmp=corpus) for flag in flags])
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_no_table_without_rows(corpus):
    done = _train("--input", corpus / "code.jsonl", "--vocab-size", 600, "--output", corpus / "base")
    assert (done.returncode, done.stdout) == (0, f"{corpus}/base: 600 entries (344 BPE tokens, 256 special tokens)\n"), done.stderr
