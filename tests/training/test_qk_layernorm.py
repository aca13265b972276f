"""A second model family: Qwen3, which is Llama with a norm of each head's queries and keys (--qk-layernorm). It is two lines of the weight
table, two of the attention and two names; here it is held to what Llama is held to: another code's logits and gradients, exact conversion
and the numbers of one process under every kind of layout."""

import pytest
import torch

from megatron_llama3.checkpoint.huggingface import export_hf, open_hf
from megatron_llama3.checkpoint.meta.params import config_to_meta
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.inference.load import load_llama
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.planning.local_ranks import run_ranks
from tests.checkpoint.huggingface.test_weights import assert_same_tensors, tensors_of
from tests.model.test_llama import inputs_for
from tests.training.layouts import Row, dtypes_of, name_of
from tests.training.test_equivalence import DEEPSPEED, PLAIN, check

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """(folder of a random model whose norms differ from channel to channel, tokens [2, 90], logits, gradients of the mean log-loss)"""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    shape = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    rope = {"rope_theta": 10_000.0, "rope_type": "llama3", **SCALING}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, rope_parameters=rope)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (weight.dim() == 1))
    tokens = torch.randint(99, (2, 90))
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    folder = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(folder)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return folder, tokens, logits.detach(), gradients


def _logits_and_norm_gradients(folder, tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    groups = initialize_groups(ParallelConfig())
    model = load_llama(open_hf(folder), groups, torch.float64).requires_grad_(True)
    logits = model(None, inputs_for(tokens)).transpose(0, 1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_weights() if "_norm" in name and "attention." in name}


def test_logits_and_gradients_are_transformers(qwen3):
    folder, tokens, logits, gradients = qwen3
    ((ours, norms),) = run_ranks(1, _logits_and_norm_gradients, folder, tokens)
    assert (ours - logits).abs().max() <= 1e-5  # transformers' rotary table is float32
    assert len(norms) == 4
    for name, gradient in norms.items():
        layer, kind = name.split(".")[1], name.split(".")[3]
        theirs = gradients[f"model.layers.{layer}.self_attn.{kind}.weight"]
        pairs = theirs.view(2, 8).T.reshape(-1)  # our order of a head's channels
        assert (gradient - pairs).norm() <= 1e-5 * pairs.norm(), name


def test_conversion_is_bitwise_and_reorders_the_norms(qwen3, tmp_path):
    folder = qwen3[0]
    source = open_hf(folder)
    theirs = tensors_of(folder)["model.layers.1.self_attn.q_norm.weight"]
    assert torch.equal(source.weights["layers.1.attention.q_norm.weight"].read(), theirs.view(2, 8).T.reshape(-1))
    export_hf(source, tmp_path / "out")
    assert_same_tensors(tensors_of(folder), tensors_of(tmp_path / "out"))


def test_metas_format_has_no_place_for_it():
    with pytest.raises(UserError, match="--qk-layernorm: Meta's code has no norms"):
        config_to_meta(ModelConfig(qk_layernorm=True), 1)


QK_NORM = {**PLAIN, "qk_norm": True}
ROWS: list[Row] = [
    {**QK_NORM, **row}
    for row in (
        {"tp": 2, "kv_heads": 2},  # without sequence parallelism a norm of the residual stream would be whole: these are not
        {"tp": 4, "kv_heads": 2, "dp": 2},  # KV heads held by two ranks each
        {"tp": 2, "sp": True, "kv_heads": 2, "cp": 2},
        {"pp": 2, "schedule": "zero-bubble", "tp": 2, "sp": True, "kv_heads": 1},
    )
]
if DEEPSPEED:
    ROWS += [
        {**QK_NORM, "tp": 2, "kv_heads": 1, "dp": 2, "engine": "deepspeed-zero-2"},
        {**QK_NORM, "tp": 2, "sp": True, "kv_heads": 2, "pp": 2, "engine": "deepspeed-zero-1"},
    ]


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * (i > 1), id=name_of(row)) for i, row in enumerate(ROWS)])
def test_layouts_have_the_numbers_of_one_process(row):
    check(row, dtypes_of(row)[0], steps=2)
