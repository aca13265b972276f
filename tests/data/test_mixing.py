"""The order in which a stream is read: mixed, without loss or repetition, and as a second writing of its rules has it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.data.mixing import Mixing, permuted
from megatron_llama3.data.packing import PackedDocuments
from megatron_llama3.planning.plain_training import Corpus
from tests.data.datasets import numbered_documents, write_dataset
from tests.training.reference_runs import SETTINGS


def sequences(mixing: Mixing, lengths: list[int]):
    """The stretches of sequences of these lengths, one after the other."""
    group, position = mixing.first_group(), 0
    for length in lengths:
        group = mixing.group_at(group, position, length)
        yield mixing.stretches(group, position, length)
        position += length
        group = mixing.group_at(group, position, length)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 4097])
def test_permuted_is_a_permutation_that_its_key_decides(count):
    order = [permuted(i, count, "a") for i in range(count)]
    assert sorted(order) == list(range(count))
    assert count < 100 or order != [permuted(i, count, "b") for i in range(count)]


def test_permuted_never_changes():
    """A new version must not give running jobs another order."""
    assert [permuted(i, 10, "key") for i in range(10)] == [9, 2, 0, 1, 6, 4, 3, 5, 7, 8]
    assert [permuted(i, 10**15, "key") for i in range(2)] == [822108787078198, 892724252511438]


def test_all_permutations_are_equally_likely():
    counts = Counter(tuple(permuted(i, 4, str(key)) for i in range(4)) for key in range(2400))
    assert len(counts) == 24
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 50  # chi-squared, 23 degrees: 0.001 lie above 49.7


def test_neighbours_part():
    """Distances between what follows each other are those of numbers drawn at random."""
    order = np.array([permuted(i, 4000, "key") for i in range(4000)])
    counts, _ = np.histogram(np.diff(order) % 4000, 20, (0, 4000))
    assert ((counts - 200) ** 2 / 200).sum() < 44  # 19 degrees: 0.001 lie above 43.8
    assert (np.abs(np.diff(order)) == 1).sum() < 10  # 2 expected


@pytest.mark.parametrize("seq_length", [64, 16, 4])
def test_a_batch_holds_as_many_blocks_as_it_can(seq_length):
    """One document of 600 blocks: whatever part of a block a sequence is, 200 that follow each other are of 200 blocks."""
    mixing = Mixing(600 * 64, 64, "key")
    found = list(sequences(mixing, [seq_length] * (600 * 64 // seq_length)))
    assert all(len(stretches) == 1 and stretches[0].length == seq_length for stretches in found)
    blocks = [stretches[0].start // 64 for stretches in found]
    assert all(len(set(blocks[start : start + 200])) == 200 for start in range(0, len(blocks), 200))
    assert Counter(blocks) == dict.fromkeys(range(600), 64 // seq_length)


def test_a_ramp_cuts_few_sequences():
    """After an odd number of half blocks only the rest of one group, and one sequence a group from then on, is of several stretches."""
    mixing = Mixing(5000 * 64, 64, "key")
    found = list(sequences(mixing, [32] * 301 + [64] * 4000))
    assert all(len(stretches) == 1 for stretches in found[:301])
    cut = [number for number, stretches in enumerate(found[301:]) if len(stretches) > 1]
    assert cut[:100] == list(range(100))  # 199 of the 500 halves of the first group are left
    assert len(cut) <= 100 + 4000 / 250


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 700),
    st.sampled_from([4, 24, 64]),
    st.lists(st.tuples(st.integers(1, 20), st.one_of(st.sampled_from([1, 2, 4, 8, 16, 64]), st.integers(1, 100))), max_size=8),
)
def test_every_token_once_an_epoch(period, block_length, ramp):
    mixing = Mixing(period, block_length, "key")
    lengths = [length for count, length in ramp for _ in range(count)]
    places = []
    for length, stretches in zip(lengths, sequences(mixing, lengths), strict=True):
        assert sum(stretch.length for stretch in stretches) == length
        places += [place for start, count in stretches for place in range(start, start + count)]
    assert len(places) == len(set(places))
    # Nothing is given before all of the epochs before has been: an epoch's last block is all that may go beyond it.
    for window in range(0, len(places), period):
        assert max(places[:window], default=0) < window + period + block_length
        assert set(range(window - period - block_length)) <= set(places[:window])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 5, 40, 200]), max_size=30),
    st.sampled_from([8, 24, 64]),
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64])), min_size=1, max_size=10),
)
def test_batches_are_those_of_the_plain_reference(tmp_path_factory, document_lengths, longest, ramp):
    dataset = write_dataset(tmp_path_factory.mktemp("data") / "a", numbered_documents([*document_lengths, 3]))
    packed = PackedDocuments(dataset, 0, dataset.num_documents, seed=7)
    stream, corpus = TrainingStream([packed], [1], 10**6, 7, longest), Corpus(dataset.prefix, 1.0, 7, longest)
    for size, length in ramp:
        batch = stream.next_batch(size, min(length, longest), 1, 0, 1)
        for k in range(size):
            expected = corpus.next(min(length, longest), SETTINGS)
            for found, array in zip((batch.tokens, batch.targets, batch.loss_mask, batch.document_ids, batch.position_ids), expected):
                np.testing.assert_array_equal(found[k, 0], array)


def test_groups_differ_by_one_block_at_most():
    mixing = Mixing(1000 * 8, 8, "key")
    group, sizes = mixing.first_group(), []
    while group.window == 0:
        start, end = mixing._bounds(group)
        sizes.append((end - start) // 8)
        group = mixing.group_at(group, end, 8)
    assert sizes == [250] * 4
