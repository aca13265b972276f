"""Each collective's forward and backward on three ranks, against what one process computes from all their inputs."""

import pytest
import torch
import torch.distributed as dist

from megatron_llama3.parallel.collectives import copy_to_group, gather_sequence, reduce_from_group, reduce_scatter_sequence
from megatron_llama3.planning.local_ranks import run_ranks

RANKS = 3


def inputs(length: int) -> list[torch.Tensor]:
    """[length, 2, 4], not contiguous: what a collective copies must not be returned as it came."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, 4, dtype=torch.float64, generator=generator).transpose(0, 1) for _ in range(RANKS)]


def _run(function, length: int, grad_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's output, and the gradient of its input for this rank's own random gradient of the output."""
    rank = dist.get_rank()
    x = inputs(length)[rank].requires_grad_()
    assert not x.is_contiguous()
    y = function(x, dist.group.WORLD)
    y.backward(inputs(grad_length + 100)[rank][:grad_length])
    return y.detach(), x.grad


def _run_all() -> dict[str, tuple]:
    return {
        "copy": _run(copy_to_group, 6, 6),
        "reduce": _run(reduce_from_group, 6, 6),
        "gather": _run(gather_sequence, 2, 6),
        "scatter": _run(reduce_scatter_sequence, 6, 2),
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple]]:
    return run_ranks(RANKS, _run_all)


def test_forward_and_backward(results):
    for rank, result in enumerate(results):
        x6, x2 = inputs(6), inputs(2)
        g6, g2 = inputs(106), inputs(102)
        mine = slice(2 * rank, 2 * rank + 2)
        expected = {
            "copy": (x6[rank], sum(g[:6] for g in g6)),
            "reduce": (sum(x6), g6[rank][:6]),
            "gather": (torch.cat(x2), sum(g[:6] for g in g6)[mine]),
            "scatter": (sum(x6)[mine], torch.cat([g[:2] for g in g2])),
        }
        for name, (forward, backward) in expected.items():
            torch.testing.assert_close(result[name][0], forward, msg=f"{name} forward on rank {rank}")
            torch.testing.assert_close(result[name][1], backward, msg=f"{name} backward on rank {rank}")


def _identity_alone() -> bool:
    x = torch.ones(2, 1, 1)
    return all(f(x, dist.group.WORLD) is x for f in (copy_to_group, reduce_from_group, gather_sequence, reduce_scatter_sequence))


def test_identity_on_a_group_of_one():
    assert run_ranks(1, _identity_alone) == [True]
