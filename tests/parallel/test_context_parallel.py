"""Balanced chunks of the sequence, and keys and values gathered in its order."""

import pytest
import torch
import torch.distributed as dist

from megatron_llama3.parallel.context_parallel import chunk_ranges, gather_keys_values, local_positions
from megatron_llama3.planning.local_ranks import run_ranks

SEQUENCE, RANKS = 24, 3


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_chunks_cover_the_sequence_once_and_balance_causal_work(cp):
    positions = [local_positions(SEQUENCE, cp, rank) for rank in range(cp)]
    assert sorted(torch.cat(positions).tolist()) == list(range(SEQUENCE))
    assert len({int((p + 1).sum()) for p in positions}) == 1, "every rank sees as many keys"


def test_rank_i_holds_chunk_i_and_its_mirror():
    assert chunk_ranges(24, 3, 0) == [(0, 4), (20, 24)]
    assert chunk_ranges(24, 3, 1) == [(4, 8), (16, 20)]
    assert chunk_ranges(24, 1, 0) == [(0, 24)]


def whole(seed: int) -> torch.Tensor:
    return torch.randn(SEQUENCE, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _gather() -> tuple:
    rank = dist.get_rank()
    mine = local_positions(SEQUENCE, RANKS, rank)
    k, v = (whole(seed)[mine].requires_grad_() for seed in (1, 2))
    keys, values = gather_keys_values(k, v, dist.group.WORLD)
    ((keys * whole(3 + rank)).sum() + (values * whole(6 + rank)).sum()).backward()
    return keys.detach(), values.detach(), k.grad, v.grad


def test_gathered_in_order_and_gradients_summed():
    for rank, (keys, values, k_grad, v_grad) in enumerate(run_ranks(RANKS, _gather)):
        mine = local_positions(SEQUENCE, RANKS, rank)
        assert torch.equal(keys, whole(1))
        assert torch.equal(values, whole(2))
        torch.testing.assert_close(k_grad, sum(whole(3 + r) for r in range(RANKS))[mine])
        torch.testing.assert_close(v_grad, sum(whole(6 + r) for r in range(RANKS))[mine])
