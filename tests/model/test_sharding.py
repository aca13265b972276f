"""The table of weights: counts, splits, and initial values that depend on the weight's name alone."""

import hashlib

import pytest
import torch

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.config.presets import PRESETS, preset
from megatron_llama3.model import initial_weights
from megatron_llama3.model.counts import parameter_count
from megatron_llama3.model.initial_weights import initial_weight
from megatron_llama3.model.llama import BuildOptions, Llama
from megatron_llama3.model.sharding import PartialOver, WeightSpec, weight_table
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.planning.equivalence import Trace, one_process, train_under
from megatron_llama3.planning.local_ranks import run_ranks
from tests.training.layouts import DEEPSPEED_AXES, config_of, matrix, name_of

PUBLISHED = {
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}
# As images and sound want them: a bias that starts at random, a convolution cut along its output channels, one cut along its input.
OTHER_RANKS = {
    "1-d": WeightSpec((240,), 0),
    "4-d": WeightSpec((24, 3, 2, 5), 0),
    "4-d cut along its input": WeightSpec((7, 24, 2, 5), 1),
}
SMALL = ModelConfig(num_layers=2, hidden_size=48, ffn_hidden_size=72, num_attention_heads=12, num_query_groups=2, vocab_size=103)


def _built_parameters(names: list[str]) -> dict[str, int]:
    groups = initialize_groups(ParallelConfig())
    options = BuildOptions(device=torch.device("meta"))
    counts = {}
    for name in names:
        model = Llama(preset(name), TensorParallel(groups.tp), groups.cp, options=options)
        counts[name] = sum(p.numel() for p in model.parameters())
    return counts


def test_parameter_counts_by_formula_by_table_as_built_and_as_published():
    (built,) = run_ranks(1, _built_parameters, list(PRESETS))
    for name in PRESETS:
        by_table = sum(torch.Size(spec.shape).numel() for spec in weight_table(preset(name)).values())
        assert parameter_count(preset(name)) == by_table == built[name], name
    assert {name: built[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 12])
def test_parts_of_an_initial_weight_make_up_the_whole(tp, monkeypatch):
    monkeypatch.setattr(initial_weights, "ROWS_BLOCK_ELEMENTS", 48 * 5)  # blocks that end within a rank's rows
    for name, spec in (weight_table(SMALL) | OTHER_RANKS).items():
        whole = initial_weight(name, spec, seed=5)
        parts = [initial_weight(name, spec, 5, tp, rank) for rank in range(tp)]
        assert [tuple(p.shape) for p in parts] == [spec.local_shape(tp, rank) for rank in range(tp)]
        dim = spec.split_dim_at(tp)
        if dim is None:
            assert all(torch.equal(part, whole) for part in parts), name
        else:
            assert torch.equal(torch.cat(parts, dim), whole), name


def test_random_values_of_a_weight_of_any_rank():
    for spec in OTHER_RANKS.values():
        assert initial_weight("w", spec, 5).std() == pytest.approx(0.02, rel=0.2)


def test_a_seed_keeps_its_values_drawn_by_blocks_of_a_million_numbers():
    expected = []
    for top, rows in ((0, 2), (2, 2), (4, 1)):
        digest = hashlib.blake2b(f"w/7/{top}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
        expected.append(torch.randn(rows, 2**19, generator=generator) * 0.5)
    assert torch.equal(initial_weight("w", WeightSpec((5, 2**19), 0, initial=0.5), 7), torch.cat(expected))


def test_constant_weights():
    norm = WeightSpec((4, 3), 1, initial="zeros")
    assert torch.equal(initial_weight("w", norm, 5, 3, 1), torch.zeros(4, 1))


def test_a_weight_that_ranks_may_hold_whole_says_over_what_its_gradient_is_partial():
    with pytest.raises(ValueError, match=r"\(48,\).*partial"):
        WeightSpec((48,))
    with pytest.raises(ValueError, match="partial"):
        WeightSpec((16, 48), 0, unit=8)
    expected = {PartialOver.SEQUENCE: (True, False), PartialOver.HEADS: (True, True), PartialOver.NOTHING: (False, False)}
    for over, (with_sp, without) in expected.items():
        spec = WeightSpec((8,), partial_over=over)
        assert (spec.gradient_is_partial(2, True), spec.gradient_is_partial(2, False)) == (with_sp, without), over
        assert not spec.gradient_is_partial(1, True)
    assert not WeightSpec((16, 48), 0, unit=8, partial_over=PartialOver.HEADS).gradient_is_partial(2, True)  # cut: each rank has its own


def test_matrices_decay_and_norms_do_not():
    assert all(spec.decays == (len(spec.shape) == 2) for spec in weight_table(SMALL).values())


def test_initial_values_differ_by_name_and_seed_and_have_the_right_spread():
    table = weight_table(SMALL)
    w1, w2 = "layers.0.feed_forward.w1.weight", "layers.1.feed_forward.w1.weight"
    assert not torch.equal(initial_weight(w1, table[w1], 5), initial_weight(w2, table[w2], 5))
    assert not torch.equal(initial_weight(w1, table[w1], 5), initial_weight(w1, table[w1], 6))
    assert initial_weight(w1, table[w1], 5).std() == pytest.approx(0.02, rel=0.05)
    assert initial_weight("x", table["layers.0.feed_forward.w2.weight"], 5).std() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(initial_weight("norm.weight", table["norm.weight"], 5), torch.ones(48))


def test_kv_heads_are_whole_heads_or_replicated():
    wk = weight_table(SMALL)["layers.0.attention.wk.weight"]
    assert wk.local_shape(2, 1) == (4, 48)
    assert wk.split_dim_at(4) is None
    assert [wk.gradient_is_partial(tp, False) for tp in (1, 2, 4)] == [False, False, True]
    norm = weight_table(SMALL)["norm.weight"]
    assert [norm.gradient_is_partial(2, sp) for sp in (False, True)] == [False, True]


def fingerprint(trace: Trace) -> str:
    digest = hashlib.sha256()
    for name in sorted(trace.weights):
        digest.update(name.encode() + trace.weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


ROWS = matrix() + matrix(DEEPSPEED_AXES, pool=1000)[:3]
SAMPLE = (0, 3, 7, 11, 42)


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if i in SAMPLE else pytest.mark.full, id=name_of(row)) for i, row in enumerate(ROWS)]
)
def test_initialisation_hashes_the_same_under_every_layout(row):
    """Every row of the matrix: virtual, uneven and empty stages, tied embeddings, both engines."""
    config = config_of(row, "fp32")
    assert fingerprint(train_under(config, 0)) == fingerprint(train_under(one_process(config), 0))
