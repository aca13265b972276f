"""The command: text out of a checkpoint on one process and under TP, and one clear line for what cannot be done."""

import contextlib
import io
import shutil
import subprocess
import sys

import pytest

from megatron_llama3.checkpoint.huggingface import export_hf
from megatron_llama3.checkpoint.lazy_tensor import WeightSource
from megatron_llama3.checkpoint.native.manifest import summarize, write_manifest
from megatron_llama3.checkpoint.native.weights import CONFIG_FILE, TOKENIZER_FOLDER, write_native
from megatron_llama3.checkpoint.tokenizer_files import tokenizer_assets
from megatron_llama3.config.command_line import load_run_config, resolved_yaml
from megatron_llama3.config.errors import UserError
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.recipes import generate
from megatron_llama3.tokenizer.llama3 import Tokenizer
from tests.inference.models import random_source

VOCABULARY = 512  # the 256 bytes and the 256 special tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of random weights: native with its tokenizer, native without one, native as a run saves it (the config names
    the tokenizer), and Hugging Face's."""
    folder = tmp_path_factory.mktemp("checkpoints")
    Tokenizer({bytes([i]): i for i in range(256)}).save(folder / "tokenizer")
    source = random_source(vocab_size=VOCABULARY)
    for name, assets in (("native", tokenizer_assets(folder / "tokenizer")), ("bare", {})):
        (folder / name).mkdir()
        write_native(WeightSource(source.model, source.weights, assets), folder / name)
    saved = folder / "run" / "iter_0000000"
    shutil.copytree(folder / "bare", folder / "run")
    shutil.rmtree(saved / TOKENIZER_FOLDER)
    config = load_run_config(str(saved / CONFIG_FILE))
    config.data.tokenizer_model = str(folder / "tokenizer")
    (saved / CONFIG_FILE).write_text(resolved_yaml(config))
    write_manifest(saved, {path.name: summarize(path) for path in saved.glob("*.distcp")})
    export_hf(folder / "native", folder / "hf")
    return folder


def _printed(argv):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        generate.main(argv)
    return output.getvalue()


def run(tp: int, *argv: str) -> list[str]:
    """What each rank printed."""
    return run_ranks(tp, _printed, [*argv, "--max-new-tokens", "12", "--dtype", "float64"])


def test_every_form_and_layout_gives_the_same_text(folder):
    prompts = ["--prompt", "def main", "--prompt", "x", "--greedy"]
    (text,) = run(1, "--load", str(folder / "native"), *prompts)
    assert text.count("---") == 2
    assert "\ndef main" in text
    assert run(1, "--load", str(folder / "native" / "iter_0000000"), *prompts) == [text]
    assert run(1, "--load", str(folder / "bare"), "--tokenizer-model", str(folder / "tokenizer"), *prompts) == [text]
    assert run(1, "--load", str(folder / "run"), *prompts) == [text]
    assert run(1, "--load-hf", str(folder / "hf"), *prompts) == [text]
    assert run(2, "--load", str(folder / "native"), *prompts) == [text, ""]


def test_a_seed_fixes_the_sample(folder):
    command = ["--load", str(folder / "native"), "--prompt", "a", "--temperature", "2", "--top-p", "1", "--seed"]
    first, again, other = (run(1, *command, seed)[0] for seed in ("1", "1", "2"))
    assert first == again != other
    assert run(2, *command, "1")[0] == first


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--load", "/no/such/folder", "--prompt", "a"], "--load /no/such/folder: no such folder"),
        (["--load-hf", "/no/such/folder", "--prompt", "a"], "--load-hf /no/such/folder: no such folder"),
        (["--load", "/tmp", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: must be above 0 and at most 1"),
        (["--load", "/tmp", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be 0"),
        (["--load", "/tmp", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be 1 or more"),
        (["--load", "/tmp"], "required: --prompt"),
        (["--prompt", "a"], "--load --load-hf is required"),
    ],
)
def test_refusals(argv, message):
    with pytest.raises(UserError, match=message):
        generate.main(argv)


def test_refusals_that_need_the_checkpoint(folder, tmp_path):
    with pytest.raises(UserError, match="no native checkpoint"):
        generate.main(["--load", str(tmp_path), "--prompt", "a"])
    with pytest.raises(UserError, match="names no tokenizer: give --tokenizer-model"):
        generate.main(["--load", str(folder / "bare"), "--prompt", "a"])


def _refused(argv):
    with pytest.raises(UserError) as caught:
        generate.main(argv)
    return str(caught.value)


def test_a_long_prompt_and_a_layout_that_cannot_be(folder):
    command = ["--load", str(folder / "native"), "--prompt", "a" * 100]
    (message,) = run_ranks(1, _refused, command)
    assert message == (
        "prompt 1 has 101 tokens; with --max-new-tokens 128 that is more than the model's 64 (max_position_embeddings): shorten one"
    )
    assert set(run_ranks(3, _refused, command)) == {
        "--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 3\n"
        "--num-query-groups 2 neither divides nor is divisible by --tensor-model-parallel-size 3"
    }


def test_the_command_exits_with_2_and_one_line():
    command = [sys.executable, "-m", "megatron_llama3.recipes.generate", "--load", "/no/such/folder", "--prompt", "a"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (2, "error: --load /no/such/folder: no such folder\n")
