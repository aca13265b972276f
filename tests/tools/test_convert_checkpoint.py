"""The converter as a command: every pair of formats, one-line refusals, bounded memory, nothing whole-looking after a kill."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_llama3.checkpoint.huggingface import open_hf
from megatron_llama3.checkpoint.huggingface.config import config_to_hf
from megatron_llama3.checkpoint.meta import write_meta
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.sharding import weight_table
from megatron_llama3.tokenizer.llama3 import Tokenizer
from tests.checkpoint import conftest
from tools import convert_checkpoint

make_hf = conftest.make_hf  # the fixture
TOOL = Path(convert_checkpoint.__file__)


def convert(monkeypatch, *arguments):
    """Runs the tool's main in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    convert_checkpoint.exit_on_user_error(convert_checkpoint.main)


def start(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(TOOL.parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, TOOL, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("target", ["native", "hf", "meta"])
@pytest.mark.parametrize("source", ["hf", "native", "meta"])
def test_every_pair_is_verified(make_hf, tmp_path, monkeypatch, capsys, source, target):
    folder = make_hf(scaled=True)
    if source != "hf":
        convert(monkeypatch, "--from", "hf", "--to", source, "--load", folder, "--save", tmp_path / "start", "--no-verify")
        folder = tmp_path / "start"
    convert(monkeypatch, "--from", source, "--to", target, "--load", folder, "--save", tmp_path / "end")
    out = capsys.readouterr().out
    assert "verified: logits differ by" in out
    assert out.strip().splitlines()[-1] == f"done: {tmp_path / 'end'}"
    convert(monkeypatch, "--from", target, "--to", "hf", "--load", tmp_path / "end", "--save", tmp_path / "back", "--no-verify")
    before, after = open_hf(make_hf(scaled=True)), open_hf(tmp_path / "back")
    assert before.model == after.model
    assert all(torch.equal(before.weights[name].read(), after.weights[name].read()) for name in before.weights)


def test_dtype_and_shards(make_hf, tmp_path, monkeypatch):
    save = tmp_path / "meta"
    flags = ("--target-model-parallel-size", 3, "--dtype", "bfloat16")
    folder = make_hf(intermediate_size=81, num_key_value_heads=3)
    convert(monkeypatch, "--from", "hf", "--to", "meta", "--load", folder, "--save", save, *flags)
    shards = [torch.load(file, weights_only=True) for file in sorted(save.glob("*.pth"))]
    assert len(shards) == 3
    assert shards[0]["layers.0.attention.wo.weight"].shape == (48, 16)
    assert {tensor.dtype for shard in shards for tensor in shard.values()} == {torch.bfloat16}


def test_exported_folder_is_complete(make_hf, tmp_path, monkeypatch, capsys):
    """From a native checkpoint come all files that transformers asks for, and a vocabulary of 513 rows stays one, padded to nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, tokenizer = make_hf(vocab_size=513), Tokenizer({bytes([i]): i for i in range(256)} | {b"ab": 256})
    tokenizer.save(tmp_path / "tokenizer", chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [257, 265]}')
    native, out = tmp_path / "native", tmp_path / "out"
    convert(monkeypatch, "--from", "hf", "--to", "native", "--load", folder, "--save", native, "--tokenizer-model", tmp_path / "tokenizer")
    convert(monkeypatch, "--from", "native", "--to", "hf", "--load", native, "--save", out)
    assert "note:" not in capsys.readouterr().out
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert {path.name for path in out.iterdir()} == files
    model, theirs = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (513, 48)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.6, [257, 265])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(theirs) == tokenizer.vocab_size == 513
    assert theirs.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "[user] ab"


def test_no_verify_reads_nothing_back(make_hf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_llama3.checkpoint.compare_logits.side_logits", lambda *arguments: pytest.fail("read back"))
    convert(monkeypatch, "--from", "hf", "--to", "native", "--load", make_hf(), "--save", tmp_path / "out", "--no-verify")
    out = capsys.readouterr().out
    assert "verified" not in out
    assert out.strip().endswith(f"done: {tmp_path / 'out'}")


def test_wrong_result_is_caught_before_it_has_its_name(make_hf, tmp_path, monkeypatch, capsys):
    """With the permutation of wq and wk left out, the logits differ and nothing is kept."""
    monkeypatch.setattr("megatron_llama3.checkpoint.huggingface.weights.to_halves", lambda name, tensor, model: tensor)
    with pytest.raises(SystemExit) as status:
        convert(monkeypatch, "--from", "hf", "--to", "hf", "--load", make_hf(), "--save", tmp_path / "out")
    assert status.value.code == 2
    assert "the logits of the two sides differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "hf", "--to", "native", "--load", "nowhere"], "--load nowhere: no such file or folder"),
        (["--from", "hf", "--to", "native", "--load", "."], "config.json: the file is missing"),
        (["--from", "meta", "--to", "native", "--load", "."], "params.json: the file is missing"),
        (["--from", "native", "--to", "hf", "--load", "."], "no native checkpoint"),
        (["--from", "gguf", "--to", "hf", "--load", "."], "0 .gguf files in this folder"),
        (["--from", "hf", "--to", "native", "--load", ".", "--target-model-parallel-size", "2"], "is for --to meta"),
        (["--from", "hf", "--to", "native", "--load", ".", "--workers", "-1"], "--workers -1: at least 1 is needed"),
        (["--from", "hf", "--to", "native", "--load", __file__], f"{__file__}/config.json: the file is missing"),
    ],
)
def test_refusals_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        convert(monkeypatch, *arguments, "--save", tmp_path / "out")
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_one_line(make_hf, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    folder = make_hf()
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        convert(monkeypatch, "--from", "hf", "--to", "meta", "--load", folder, "--save", tmp_path / "file" / "out")
    assert status.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"


def big_model(folder, layers=12):
    """A Hugging Face folder of sparse files: 31 MB a layer that take no disk and read as zeros."""
    model = ModelConfig(
        num_layers=layers, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=8, vocab_size=8192
    )
    header, end = {}, 0
    from megatron_llama3.checkpoint.names import to_hf_name

    for name, spec in weight_table(model).items():
        size = 2 * torch.Size(spec.shape).numel()
        header[to_hf_name(name)] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model)))
    return folder, end


def leftovers(tmp_path, *inputs):
    return sorted(path.name for path in tmp_path.iterdir() if path.name not in inputs)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["native", "hf", "meta"])
def test_killed_in_mid_write_leaves_nothing_whole_looking(tmp_path, target):
    folder, size = big_model(tmp_path / "big")
    arguments = ("--from", "hf", "--to", target, "--load", folder, "--save", tmp_path / "out", "--no-verify")
    process = start(*arguments, stdout=subprocess.PIPE)
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 120
    while sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) < size // 10 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert leftovers(tmp_path, "big") == ["out.partial"]
    again = start(*arguments, stdout=subprocess.PIPE)
    assert again.wait() == 0, again.stderr.read()
    assert leftovers(tmp_path, "big") == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["native", "hf", "meta"])
def test_disk_that_fills_up_is_one_line(tmp_path, target):
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the same way."""
    folder, _ = big_model(tmp_path / "big", layers=2)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    arguments = ("--from", "hf", "--to", target, "--load", folder, "--save", tmp_path / "out", "--no-verify")
    process = start(*arguments, stdout=subprocess.PIPE, preexec_fn=small_files)
    error = process.communicate()[1]
    assert process.returncode == 2
    assert "while writing; nothing was kept" in error
    assert error.count("\n") == 1
    assert leftovers(tmp_path, "big") == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["native", "hf", "meta"])
@pytest.mark.parametrize("missing_bytes", [0, 4096])
def test_full_disk(tmp_path, monkeypatch, capsys, small_disk, target, missing_bytes):
    """A disk with room for the weights but not for their headers fills up while writing; a page less is refused at the start."""
    folder, _ = big_model(tmp_path / "big", layers=2)
    size = open_hf(folder).nbytes()
    disk = small_disk(-(-size // 4096) * 4096 - missing_bytes)
    with pytest.raises(SystemExit) as status:
        convert(monkeypatch, "--from", "hf", "--to", target, "--load", folder, "--save", disk / "out", "--no-verify")
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert ("GB are needed and" if missing_bytes else "No space left on device while writing; nothing was kept") in error
    assert error.count("\n") == 1
    assert list(disk.iterdir()) == []


LIMITED = """
import resource, sys
from megatron_llama3.checkpoint import compare_logits
from megatron_llama3.checkpoint.gguf import weights
from megatron_llama3.checkpoint.huggingface import weights
from megatron_llama3.checkpoint.meta import weights
from megatron_llama3.checkpoint.native import weights
import torch
sys.path.insert(0, {tools!r})
import convert_checkpoint
torch.zeros(8) + 1
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + {extra}, now + {extra}))
convert_checkpoint.exit_on_user_error(convert_checkpoint.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("hf", "native"), ("hf", "hf"), ("hf", "meta"), ("native", "meta"), ("meta", "hf")])
def test_memory_is_bounded(tmp_path, source, target):
    """Files of 0.57 GB in 128 MB more of anonymous memory than the imports take (RLIMIT_DATA does not count read-only mapped files)."""
    folder, size = big_model(tmp_path / "big", layers=17)
    extra = 128 << 20
    assert size > 4 * extra
    if source != "hf":
        write = {"native": write_native, "meta": partial(write_meta, num_shards=2)}[source]
        (tmp_path / source).mkdir()
        write(open_hf(folder), tmp_path / source)
        folder = tmp_path / source
    program = LIMITED.format(tools=str(TOOL.parent), extra=extra)
    arguments = ["--from", source, "--to", target, "--load", folder, "--save", tmp_path / "out", "--no-verify", "--workers", 2]
    arguments += ["--dtype", "float32"] if target == "native" else []  # the conversion of a dtype is bounded too
    environment = os.environ | {"PYTHONPATH": str(TOOL.parent.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out").is_dir()


def test_converted_weights_open_as_a_native_checkpoint(make_hf, tmp_path, monkeypatch):
    """What training's --load --finetune reads: the latest file, the run config, global names."""
    convert(monkeypatch, "--from", "hf", "--to", "native", "--load", make_hf(), "--save", tmp_path / "out", "--no-verify")
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert json.loads((tmp_path / "out" / "iter_0000000" / "train_state.json").read_text())["iteration"] == 0
    assert open_native(tmp_path / "out").model.num_layers == 3
