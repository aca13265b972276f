"""Counts by the weight table against the published numbers."""

import pytest

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.presets import preset, preset_name
from megatron_llama3.model.counts import flops_per_token, layer_parameter_count, parameter_count

# name: parameters in all, of one layer, head width (released checkpoints; paper, Table 3)
PUBLISHED = {
    "llama3-8b": (8_030_261_248, 218_112_000, 128),
    "llama3-70b": (70_553_706_496, 855_654_400, 128),
    "llama3-405b": (405_853_388_800, 3_187_703_808, 128),
    "llama3.1-8b": (8_030_261_248, 218_112_000, 128),
    "llama3.1-70b": (70_553_706_496, 855_654_400, 128),
    "llama3.1-405b": (405_853_388_800, 3_187_703_808, 128),
    "llama3.2-1b": (1_235_814_400, 60_821_504, 64),
    "llama3.2-3b": (3_212_749_824, 100_669_440, 128),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    model = preset(name)
    assert (parameter_count(model), layer_parameter_count(model), model.head_dim) == PUBLISHED[name]
    assert preset_name(model) == name


def test_small_presets_are_small():
    assert parameter_count(preset("tiny")) == 7_342_336
    assert parameter_count(preset("tiny")) < parameter_count(preset("quickstart")) < 20_000_000


def test_a_layers_part_on_one_tensor_parallel_rank():
    """Counted by hand: hidden 256, 8 heads of 32, feed-forward 768; wk and wv are whole where TP exceeds the KV heads."""
    matrices, norms, kv_head = 2 * 256 * 256 + 3 * 256 * 768, 2 * 256, 2 * 256 * 32
    for tp, kv_heads, held in ((1, 4, 4), (2, 4, 2), (4, 4, 1), (8, 2, 2), (8, 1, 1)):
        assert layer_parameter_count(ModelConfig(num_query_groups=kv_heads), tp) == matrices // tp + norms + kv_head * held


def test_flops_of_one_token_counted_matrix_by_matrix():
    """Two layers with every size different: each product [m, k] x [k, n] of the forward pass costs 2mkn, backward twice that."""
    model = ModelConfig(
        num_layers=2, hidden_size=12, ffn_hidden_size=20, num_attention_heads=6, num_query_groups=3, kv_channels=4, vocab_size=50
    )
    s = 7
    projections = 12 * 24 + 2 * 12 * 12 + 24 * 12 + 3 * 12 * 20
    forward = 2 * (2 * projections + 50 * 12)
    pairs_full, pairs_causal = s * s, sum(range(1, s + 1))
    attention = 2 * 2 * 6 * 4 * 2  # QK^T and AV, heads x width, layers
    assert flops_per_token(model, s, causal=False) == pytest.approx(3 * (forward + attention * pairs_full / s))
    assert flops_per_token(model, s, causal=True) == pytest.approx(3 * (forward + attention * pairs_causal / s))


def test_405b_makes_38e24_flops():
    """Paper, section 1: 3.8e25 FLOPs, which is 6 N D."""
    assert 15.6e12 * 6 * parameter_count(preset("llama3-405b")) == pytest.approx(3.8e25, rel=0.01)
    assert 15.6e12 * flops_per_token(preset("llama3-405b"), 8192, causal=True) == pytest.approx(3.8e25, rel=0.05)
