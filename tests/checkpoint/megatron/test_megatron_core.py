"""Megatron-LM's checkpoints against megatron-core: what it saved is read, and what is written here it loads, bitwise, in any layout."""

from functools import partial

import pytest
import torch

from megatron_llama3.checkpoint.compare_logits import our_logits
from megatron_llama3.checkpoint.megatron import open_megatron, write_megatron
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.planning.local_ranks import run_ranks
from tests.checkpoint.megatron import oracle

CASES = {  # (TP, PP) of the save and of the load, stacked, options
    "stacked": ((1, 1), (2, 2), True, {}),
    "not stacked": ((1, 1), (2, 1), False, {}),
    "tp2": ((2, 1), (1, 1), True, {}),
    "tp2_pp2": ((2, 2), (1, 2), False, {"tied": True}),
    "pp2, bf16": ((1, 2), (1, 1), True, {"dtype": torch.bfloat16}),
    "norms of queries and keys": ((1, 1), (1, 1), True, {"qk_norm": True}),
}


def saved(folder, layout, is_stacked, options):
    run_ranks(layout[0] * layout[1], partial(oracle.save, folder, is_stacked, *layout, **options))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_through_native_and_back_megatron_core_loads_the_same(tmp_path, case):
    layout, other, is_stacked, options = CASES[case]
    theirs = saved(tmp_path / "theirs", layout, is_stacked, options)
    for folder in ("native", "ours"):
        (tmp_path / folder).mkdir()
    write_native(open_megatron(theirs), tmp_path / "native")
    write_megatron(open_native(tmp_path / "native"), tmp_path / "ours", is_stacked=is_stacked, is_te=False)
    world = other[0] * other[1]
    before = run_ranks(world, partial(oracle.load, theirs / "iter_0000007", is_stacked, *other, **options))
    after = run_ranks(world, partial(oracle.load, tmp_path / "ours" / "release", is_stacked, *other, **options))
    for one, two in zip(before, after, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype
            assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"qk_norm": True}])
def test_logits_are_those_of_megatron_core(tmp_path, options):
    saved(tmp_path, (1, 1), True, options)
    tokens = torch.randint(128, (40,), generator=torch.Generator().manual_seed(0))
    (theirs,) = run_ranks(1, partial(oracle.logits, tmp_path / "iter_0000007", True, tokens, **options))
    assert torch.allclose(our_logits(open_megatron(tmp_path), tokens), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
