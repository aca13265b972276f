"""One dataset's stream: every token once an epoch, in an order that nothing but seed, epoch and content decides."""

import multiprocessing

import numpy as np
import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.data import packing
from megatron_llama3.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_llama3.data.packing import PackedDocuments, load_or_build, shuffled
from tests.data.datasets import numbered_documents, random_documents, write_dataset

LENGTHS = [5, 0, 1, 30, 7, 0, 0, 12, 1, 1, 64, 3, 0]


@pytest.fixture
def packed(tmp_path):
    return PackedDocuments(write_dataset(tmp_path / "a", numbered_documents(LENGTHS)), 0, len(LENGTHS), seed=1)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 4096, 4097])
def test_shuffled_is_a_permutation_that_its_key_decides(count):
    assert sorted(shuffled(count, "a")) == list(range(count))
    assert shuffled(count, "a").tolist() == shuffled(count, "a").tolist()
    assert count < 1000 or shuffled(count, "a").tolist() != shuffled(count, "b").tolist()


def test_shuffled_never_changes():
    """A new numpy must not give running jobs another order."""
    assert shuffled(10, "key").tolist() == [8, 4, 0, 9, 1, 6, 3, 7, 5, 2]


def test_shuffled_puts_every_document_everywhere():
    places = np.zeros((8, 8))
    for key in range(4000):
        places[np.arange(8), shuffled(8, str(key))] += 1
    assert np.abs(places / 500 - 1).max() < 0.2  # 4 standard deviations


def test_an_epoch_gives_every_token_once_and_documents_whole(packed):
    total = sum(LENGTHS)
    for epoch in range(3):
        tokens, documents = packed.read(epoch * total, total, vocab_size=total)
        assert sorted(tokens) == list(range(total))
        for ordinal in range(documents.max() + 1):
            document = tokens[documents == ordinal]
            assert (np.diff(document) == 1).all()
            assert document[0] in np.cumsum(LENGTHS) - LENGTHS
        assert documents.max() + 1 == np.count_nonzero(LENGTHS)


def test_epochs_and_seeds_differ(packed):
    total = packed.tokens_per_epoch
    other = PackedDocuments(packed.dataset, 0, len(LENGTHS), seed=2)
    orders = [packed.read(0, total, total), packed.read(total, total, total), other.read(0, total, total)]
    assert len({tuple(order.tokens) for order in orders}) == 3


@pytest.mark.parametrize("length", [1, 2, 17, 100, 124, 125, 400])
def test_any_length_cuts_the_same_stream(packed, length):
    whole = packed.read(0, 1200, 1000).tokens
    cut = np.concatenate([packed.read(start, length, 1000).tokens for start in range(0, 1200 - length, length)])
    np.testing.assert_array_equal(cut, whole[: len(cut)])


def test_the_end_of_an_epoch_is_the_end_of_a_document(tmp_path):
    packed = PackedDocuments(write_dataset(tmp_path / "one", numbered_documents([5])), 0, 1, seed=1)
    tokens, documents = packed.read(3, 9, 5)
    assert tokens.tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert documents.tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_datasets_of_one_size_differ_in_order(packed, tmp_path):
    """Two halves of a parallel corpus must not come in step."""
    other = write_dataset(tmp_path / "b", numbered_documents(LENGTHS, first_id=1000))
    other = PackedDocuments(other, 0, len(LENGTHS), seed=1)
    assert other.spans(0, 124).documents.tolist() != packed.spans(0, 124).documents.tolist()


def test_only_the_documents_of_the_split_are_given(tmp_path):
    packed = PackedDocuments(write_dataset(tmp_path / "a", numbered_documents(LENGTHS)), 3, 8, seed=1)
    assert sorted(packed.read(0, packed.tokens_per_epoch, 1000).tokens) == list(range(6, 55))


def test_an_id_outside_the_vocabulary_names_dataset_document_and_id(tmp_path):
    documents = numbered_documents(LENGTHS)
    packed = PackedDocuments(write_dataset(tmp_path / "a", documents), 0, len(LENGTHS), seed=1)
    with pytest.raises(UserError, match=r"a: document 11 holds token id 123, outside .* 123 entries"):
        packed.read(0, packed.tokens_per_epoch, vocab_size=123)
    with IndexedDatasetWriter(tmp_path / "b", np.int32) as writer:
        writer.add_document(np.array([0, 1, -5], dtype=np.int32))
        writer.finalize()
    with pytest.raises(UserError, match="document 0 holds token id -5"):
        PackedDocuments(IndexedDataset(tmp_path / "b"), 0, 1, seed=1).read(0, 3, vocab_size=124)


@pytest.mark.parametrize("first, last", [(0, 0), (5, 7)])
def test_documents_without_a_token_are_refused(packed, first, last):
    with pytest.raises(UserError, match=f"documents {first} to {last} of its 13 hold no token"):
        PackedDocuments(packed.dataset, first, last, seed=1)


def _read_with_cache(prefix, cache, barrier, results) -> None:
    packing._CACHE_FROM_DOCUMENTS = 0
    packed = PackedDocuments(IndexedDataset(prefix), 0, 20_000, seed=1, cache_path=cache)
    barrier.wait()
    results.put(packed.read(1000, 5000, 60000).tokens.tolist())


def test_ranks_that_start_at_once_share_one_cache(tmp_path):
    dataset = write_dataset(tmp_path / "a", random_documents(20_000, seed=1))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    arguments = (str(tmp_path / "a"), str(tmp_path / "cache"), barrier, results)
    ranks = [context.Process(target=_read_with_cache, args=arguments) for _ in range(8)]
    for rank in ranks:
        rank.start()
    expected = PackedDocuments(dataset, 0, 20_000, seed=1).read(1000, 5000, 60000).tokens.tolist()
    assert all(results.get(timeout=60) == expected for _ in ranks)
    for rank in ranks:
        rank.join()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--data-cache-path: cannot use .*file/x.npy"):
        load_or_build(tmp_path / "file" / "x.npy", (3,), lambda: np.arange(3))


def test_a_damaged_cache_is_built_again(tmp_path):
    path = tmp_path / "cache" / "x.npy"
    built = []

    def build():
        built.append(1)
        return np.arange(6).reshape(2, 3)

    damages = [
        lambda: path.write_bytes(path.read_bytes()[:140]),
        lambda: path.write_bytes(b""),
        lambda: np.save(path, np.arange(5)),
    ]
    for damage in [lambda: None, *damages]:
        damage()
        for _ in range(2):
            assert load_or_build(path, (2, 3), build).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(built) == 4
