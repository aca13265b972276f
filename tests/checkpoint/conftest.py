"""Small models in Hugging Face's form, made by transformers itself."""

import shutil

import pytest
import torch

from megatron_llama3.checkpoint.lazy_tensor import WeightSource, from_tensor
from megatron_llama3.checkpoint.native import write_native
from megatron_llama3.checkpoint.native.folder import LATEST_FILE
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.initial_weights import initial_weight
from megatron_llama3.model.sharding import weight_table

LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="session")
def make_hf(tmp_path_factory):
    """make_hf(dtype=..., tied=..., scaled=True or other numbers, max_shard_size=..., **config fields) -> folder with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(dtype=torch.float32, tied=False, scaled=False, max_shard_size="5GB", seed=0, **fields):
        rope = {"rope_theta": 500_000.0, "rope_type": "default"}
        if scaled:
            rope |= {"rope_type": "llama3", **LLAMA3_SCALING, **(scaled if isinstance(scaled, dict) else {})}
        shape = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
        shape |= {"intermediate_size": 80, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, **fields}
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=tied))
        with torch.no_grad():
            for weight in model.parameters():  # norms too: weights of one value hide mistakes
                weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
        folder = tmp_path_factory.mktemp("hf")
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


@pytest.fixture(scope="session")
def hf_logits():
    """hf_logits(folder) -> fp32 logits [2, 100, V] of transformers' model on fixed random tokens."""
    from transformers import LlamaForCausalLM

    def logits(folder):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        tokens = torch.randint(model.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return model(tokens).logits

    return logits


@pytest.fixture
def save(tmp_path):
    """A --save folder with iter_0000010, 20 and 30, the last one named as latest, as runs leave it."""
    model = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=50)
    weights = {name: from_tensor(initial_weight(name, spec, 0)) for name, spec in weight_table(model).items()}
    write_native(WeightSource(model, weights), tmp_path)
    first = tmp_path / "iter_0000000"
    for iteration in (10, 20, 30):
        shutil.copytree(first, tmp_path / f"iter_{iteration:07d}")
    shutil.rmtree(first)
    (tmp_path / LATEST_FILE).write_text("30")
    return tmp_path
