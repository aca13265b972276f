"""Every reader on files with bytes changed, cut short, or with other values in their JSON: they are read, or refused in one line."""

import json
import random
import resource
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_llama3.checkpoint.gguf import open_gguf
from megatron_llama3.checkpoint.huggingface import open_hf, write_hf
from megatron_llama3.checkpoint.lazy_tensor import WeightSource, from_tensor
from megatron_llama3.checkpoint.meta import open_meta, write_meta
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.checkpoint.native.manifest import damage, damaged_files
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.initial_weights import initial_weight
from megatron_llama3.model.sharding import weight_table
from megatron_llama3.tokenizer.llama3 import check_vocabulary_size, load_tokenizer
from tests.checkpoint.gguf.test_weights import write_gguf
from tests.tokenizer.vocabularies import small_vocabulary

MODEL = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1, vocab_size=16)
WRITE = {"hf": write_hf, "native": write_native, "meta": lambda source, folder: write_meta(source, folder, 2)}
VALUES = [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -1e300, 1e400, float("nan"), "", "x", "a/../b", "é\ud800"]
VALUES += [[], [1], [[1]], {}, {"a": 1}, ["x"] * 1000]


def read_checkpoint(folder) -> None:
    step = folder / "iter_0000000"
    if damage(step) is None:
        list(damaged_files(step))
    (step / "manifest.json").rename(folder / "aside")  # what is found without its checksums
    try:
        damage(step)
    finally:
        (folder / "aside").rename(step / "manifest.json")
    read_weights(open_native(folder))


def read_weights(source) -> None:
    for tensor in source.weights.values():
        tensor.read()


def read_tokenizer(folder) -> None:
    check_vocabulary_size(folder, 1024)
    load_tokenizer(folder / "tokenizer.json")
    load_tokenizer(folder / "tokenizer.model")


READ = {
    "hf": lambda folder: read_weights(open_hf(folder)),
    "native": read_checkpoint,
    "meta": lambda folder: read_weights(open_meta(folder)),
    "gguf": lambda folder: read_weights(open_gguf(folder)),
    "tokenizer": read_tokenizer,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("good")
    source = WeightSource(MODEL, {name: from_tensor(initial_weight(name, spec, 0)) for name, spec in weight_table(MODEL).items()})
    for kind in READ:
        (folder / kind).mkdir()
    for kind, write in WRITE.items():
        write(source, folder / kind)
    write_gguf(folder / "gguf" / "model.gguf", MODEL)
    small_vocabulary().save(folder / "tokenizer")
    return folder


def damaged(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, most of them near the ends, where headers and tables lie, or the file cut, or lengthened."""
    how = dice.random()
    if how < 0.2:
        return data[: dice.randrange(len(data))]
    if how < 0.25:
        return data + bytes(dice.randrange(256) for _ in range(dice.choice((1, 100))))
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 3))):
        reach = min(len(data), dice.choice((64, 512, len(data))))
        place = dice.randrange(reach)
        changed[place if dice.random() < 0.5 else len(data) - 1 - place] = dice.randrange(256)
    return bytes(changed)


def with_another_value(content, dice: random.Random):
    """JSON with one value, or one key, replaced."""
    if isinstance(content, dict | list) and content and dice.random() < 0.9:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = keys[dice.randrange(len(keys))]
        if isinstance(content, dict) and dice.random() < 0.15:
            return {("other" if k == key else k): v for k, v in content.items() if k != key or dice.random() < 0.5}
        copy = content.copy()
        copy[key] = with_another_value(content[key], dice)
        return copy
    return VALUES[dice.randrange(len(VALUES))]


def changed(path, dice: random.Random) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".json" and dice.random() < 0.6:
        return json.dumps(with_another_value(json.loads(data), dice)).encode()
    if path.suffix == ".safetensors" and dice.random() < 0.5:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(with_another_value(json.loads(data[8 : 8 + length]), dice)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return damaged(data, dice)


def hold(kind, good, tmp_path_factory, examples: int, least_refused: int, same_each_time: bool) -> None:
    folder = shutil.copytree(good / kind, tmp_path_factory.mktemp("fuzzed") / kind)
    READ[kind](folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines: set[str] = set()
    refused, memory = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=examples, deadline=None, database=None, derandomize=same_each_time, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))
    def read(dice):
        nonlocal refused
        path = files[dice.randrange(len(files))]
        whole = path.read_bytes()
        path.write_bytes(changed(path, dice))
        try:
            READ[kind](folder)
        except UserError as error:
            refused += 1
            lines.update(str(error).splitlines()[1:])
        finally:
            path.write_bytes(whole)

    read()
    assert refused >= least_refused
    assert lines == set(), "more than one line"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 20, "a gigabyte for a small file"


@pytest.mark.parametrize("kind", READ)
def test_changed_files_are_read_or_refused(good, tmp_path_factory, kind):
    hold(kind, good, tmp_path_factory, examples=100, least_refused=20, same_each_time=True)


@pytest.mark.full
@pytest.mark.parametrize("kind", READ)
def test_700_changed_files_are_read_or_refused(good, tmp_path_factory, kind):
    hold(kind, good, tmp_path_factory, examples=700, least_refused=200, same_each_time=False)
