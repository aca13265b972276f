"""Chains of conversions end bit by bit where they began, whatever lies between."""

import json
import shutil

import pytest
import torch

from megatron_llama3.checkpoint.huggingface import open_hf, write_hf
from megatron_llama3.checkpoint.meta import open_meta, write_meta
from megatron_llama3.checkpoint.native import open_native, write_native

OPEN = {"hf": open_hf, "meta": open_meta, "native": open_native}
WRITE = {"hf": write_hf, "meta": lambda source, folder: write_meta(source, folder, 6), "native": write_native}


def through(source, chain, tmp_path):
    """`source` written and read in each format of the chain."""
    for number, kind in enumerate(chain):
        folder = tmp_path / f"{number}_{kind}"
        folder.mkdir()
        WRITE[kind](source, folder)
        source = OPEN[kind](folder)
    return source, folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chain", [("native", "hf"), ("meta", "native", "meta"), ("native", "meta", "native", "hf")], ids="-".join)
def test_round_trip(make_hf, tmp_path, chain, dtype, tied):
    """Six Meta shards cut the two KV heads' weights three times over."""
    folder = make_hf(dtype=dtype, tied=tied, scaled=True, hidden_size=96, num_attention_heads=6, intermediate_size=96, vocab_size=102)
    (tmp_path / "first").mkdir()
    start, first = through(open_hf(folder), chain[:1], tmp_path / "first")
    end, last = through(start, chain[1:], tmp_path)
    assert end.model == start.model == open_hf(folder).model
    for name, tensor in start.weights.items():
        assert end.weights[name].dtype == dtype
        assert torch.equal(end.weights[name].read().view(torch.uint8), tensor.read().view(torch.uint8)), name
    if chain[-1] == "hf":
        assert_files_equal(folder, last)
    if chain[0] == chain[-1] == "meta":
        for file in first.iterdir():
            assert file.read_bytes() == (last / file.name).read_bytes()


def assert_files_equal(a, b):
    """Same tensors under the same names; the order in the file may be another."""
    from safetensors.torch import load_file

    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize("chain", [("meta", "hf"), ("native", "hf"), ("native", "meta", "native", "hf")], ids="-".join)
def test_token_ids_and_sampling_defaults_stay(make_hf, tmp_path, chain):
    """Generation would not stop without them."""
    folder = shutil.copytree(make_hf(vocab_size=96, intermediate_size=96), tmp_path / "start")
    settings = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 3, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    end, last = through(open_hf(folder), chain, tmp_path)
    assert end.generation.items() >= settings.items()
    assert json.loads((last / "generation_config.json").read_text()).items() >= settings.items()
    config = json.loads((last / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 7], 3)
