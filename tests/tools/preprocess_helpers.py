"""Corpora and runs for the tests of tools/preprocess_data.py. Runs are forked from the test process, to spare them the imports."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_llama3.config.errors import UserError
from megatron_llama3.data import preprocess_inputs
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.preprocess import PreprocessOptions, preprocess
from tests.tokenizer.texts import ALL
from tests.tokenizer.vocabularies import small_vocabulary

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def documents(count, seed=0):
    """Texts of mixed languages and lengths, some spelling special tokens."""
    random = np.random.default_rng(seed)
    pieces = list(ALL.values())
    return [" ".join(random.choice(pieces, random.integers(1, 12))) for _ in range(count)]


def write_jsonl(path, texts, key="text"):
    path.write_bytes(b"".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, text in enumerate(texts)))
    return path


def compress(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        import zstandard

        half = len(data) // 2  # two frames, as parallel compressors write
        path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
    return path


def vocabulary_folder(tmp_path):
    folder = tmp_path / "vocabulary"
    if not folder.exists():
        small_vocabulary().save(folder)
    return folder


def options(tmp_path, *inputs, prefix="out", **changes):
    settings = {"append_eod": True, "workers": 2, **changes}
    return PreprocessOptions(tuple(map(str, inputs)), str(tmp_path / prefix), str(vocabulary_folder(tmp_path)), **settings)


def forked(action, timeout=60):
    """Runs `action` in a forked process group; returns its exit status, negative for a signal, and the UserError's text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            signal.alarm(timeout)
            action()
            status = 0
        except UserError as error:
            os.write(writing, str(error).encode())
            status = 2
        finally:
            os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read().decode()
    return os.waitstatus_to_exitcode(status), message


def run(settings):
    return forked(lambda: preprocess(settings))


def run_tool(*flags, **keywords):
    """The tool as its users start it."""
    command = [sys.executable, str(TOOL), *map(str, flags)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, env=ENVIRONMENT, **keywords)


def output_bytes(settings, key="text"):
    prefix = f"{settings.prefix}_{key}_document"
    return {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx", ".sources.npy")}


def expected_ids(texts, bos=False, eos=True):
    return [small_vocabulary().encode(text, bos=bos, eos=eos) for text in texts]


def decoded(settings, key="text"):
    dataset = IndexedDataset(f"{settings.prefix}_{key}_document")
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def small_units(monkeypatch, size=4096):
    """Many shards out of little text."""
    monkeypatch.setattr(preprocess_inputs, "MIN_UNIT_BYTES", size)
    monkeypatch.setattr(preprocess_inputs, "MAX_UNIT_BYTES", size)
