"""A batch cut into micro-batches and over context-parallel ranks: which numbers land where."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_llama3.data.loader import Batch
from megatron_llama3.training.microbatch import make_microbatches

LENGTH = 8
# With CP 2 the sequence has four chunks: rank 0 has the first and the last, rank 1 the two between.
POSITIONS = {(1, 0): list(range(8)), (2, 0): [0, 1, 6, 7], (2, 1): [2, 3, 4, 5]}


def batch_of(*, documents: int, is_shifted: bool = False) -> Batch:
    """Two micro-batches of two sequences, each number telling its place; positions as in the sequence, or later in its second row."""
    shape = (2, 2, LENGTH)
    tokens = np.arange(32).reshape(shape)
    ids = np.broadcast_to(np.arange(LENGTH) * documents // LENGTH, shape).copy()
    positions = np.broadcast_to(np.arange(LENGTH), shape).copy()
    if is_shifted:
        positions[:, 1] += 100
    return Batch(tokens=tokens, targets=tokens + 1000, position_ids=positions, document_ids=ids, loss_mask=tokens % 3 == 0)


def made(batch: Batch, cp_size: int, cp_rank: int, document_mask: bool = True):
    groups = SimpleNamespace(topology=SimpleNamespace(cp=cp_size), at=SimpleNamespace(cp=cp_rank), device=torch.device("cpu"))
    return make_microbatches(batch, groups, document_mask)


@pytest.mark.parametrize("cp_size, cp_rank", POSITIONS)
def test_a_rank_has_its_positions_of_every_array_with_the_sequence_first(cp_size, cp_rank):
    mine = POSITIONS[cp_size, cp_rank]
    for m, (inputs, loss_mask) in enumerate(made(batch_of(documents=2, is_shifted=True), cp_size, cp_rank)):
        expected = torch.tensor([[16 * m + position, 16 * m + LENGTH + position] for position in mine])
        assert torch.equal(inputs.tokens, expected)
        assert torch.equal(inputs.targets, expected + 1000)
        assert torch.equal(loss_mask, expected % 3 == 0)
        assert torch.equal(inputs.position_ids, torch.tensor([[position, position + 100] for position in mine]))


def test_rows_of_the_same_positions_share_one():
    for inputs, _ in made(batch_of(documents=1), 2, 1):
        assert torch.equal(inputs.position_ids, torch.tensor([[2], [3], [4], [5]]))


@pytest.mark.parametrize("documents, document_mask, is_masked", [(2, True, True), (2, False, False), (1, True, False)])
def test_documents_are_told_apart_where_there_are_several_and_it_is_wanted(documents, document_mask, is_masked):
    batch = batch_of(documents=documents)
    for m, (inputs, _) in enumerate(made(batch, 2, 1, document_mask)):
        assert inputs.mask.query_ranges == [(2, 4), (4, 6)]
        if is_masked:
            np.testing.assert_array_equal(inputs.mask.document_ids, batch.document_ids[m])
        else:
            assert inputs.mask.document_ids is None
