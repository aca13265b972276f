"""The reader and writer against megatron-core's own, byte for byte, and against damaged files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as MegatronBuilder
from megatron.core.datasets.utils import Split

from megatron_llama3.config.errors import UserError
from megatron_llama3.data import dataset_writer, indexed_dataset
from megatron_llama3.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for_vocab_size
from tests.data.datasets import random_documents, write_dataset

DTYPES = [np.uint16, np.int32]


def write_with_megatron(prefix: Path, documents: list[list[np.ndarray]], dtype: type) -> None:
    """documents: a list of sequences each."""
    builder = MegatronBuilder(f"{prefix}.bin", dtype)
    for sequences in documents:
        builder.add_document(np.concatenate([np.empty(0, np.int64), *sequences]), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_the_bytes_that_megatron_writes(tmp_path, dtype):
    documents = random_documents(300, seed=1)
    write_with_megatron(tmp_path / "theirs", [[document] for document in documents], dtype)
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as writer:
        writer.add_documents(np.concatenate(documents[:100]), [len(d) for d in documents[:100]])
        for document in documents[100:200]:
            writer.add_document(document)
        for document in documents[200:]:
            writer.append_tokens(document[:7])
            writer.append_tokens(document[7:])
            writer.end_document()
        writer.finalize()
    for part in ("bin", "idx"):
        assert (tmp_path / f"ours.{part}").read_bytes() == (tmp_path / f"theirs.{part}").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_ours_and_we_read_theirs(tmp_path, dtype):
    documents = random_documents(200, seed=2)
    ours = write_dataset(tmp_path / "ours", documents, dtype)
    theirs = MegatronDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(documents) == ours.num_documents
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(theirs[i], document)
        np.testing.assert_array_equal(ours.document(i), document)
    assert theirs[0].dtype == ours.document(0).dtype == dtype


def test_chunks_of_the_index_make_no_difference(tmp_path, monkeypatch):
    """What is done a million entries at a time, with 7 at a time."""
    documents = random_documents(100, seed=9)
    write_with_megatron(tmp_path / "a", [documents[:30], [], *[[document] for document in documents[30:]]], np.uint16)
    monkeypatch.setattr(indexed_dataset, "_CHUNK", 7)
    monkeypatch.setattr(dataset_writer, "_CHUNK", 7)
    dataset = IndexedDataset(tmp_path / "a")
    with IndexedDatasetWriter(tmp_path / "b", np.uint16) as writer:
        writer.add_dataset(dataset)
        writer.finalize()
    for part in ("bin", "idx"):
        assert (tmp_path / f"b.{part}").read_bytes() == (tmp_path / f"a.{part}").read_bytes()
    index = np.fromfile(tmp_path / "a.idx", dtype=np.uint8)
    for byte in range(34, len(index), 4):  # a damage at any border between chunks
        index[byte] ^= 255
        (tmp_path / "a.idx").write_bytes(index.tobytes())
        with pytest.raises(UserError):
            IndexedDataset(tmp_path / "a")
        index[byte] ^= 255


def test_megatrons_documents_of_several_sequences_or_none(tmp_path):
    sequences = random_documents(60, seed=3)
    documents = [[], sequences[:10], sequences[10:11], [], *[[s] for s in sequences[11:50]], sequences[50:], []]
    write_with_megatron(tmp_path / "theirs", documents, np.int32)
    dataset = IndexedDataset(tmp_path / "theirs")
    assert (dataset.num_documents, dataset.num_sequences) == (len(documents), 60)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(dataset.document(i), np.concatenate([[], *document]))
    assert dataset.document_lengths.tolist() == [sum(map(len, document)) for document in documents]


def test_as_many_documents_as_sequences_need_not_mean_one_each(tmp_path):
    write_with_megatron(tmp_path / "theirs", [[], [np.array([1]), np.array([2, 3])], [np.array([4])]], np.int32)
    dataset = IndexedDataset(tmp_path / "theirs")
    assert [dataset.document(i).tolist() for i in range(3)] == [[], [1, 2, 3], [4]]


class _Tokenizer:
    vocab_size, eod, unique_identifiers = 60000, 0, {"class": "test"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatrons_gpt_dataset_opens_ours_with_the_samples_of_its_own(tmp_path, dtype):
    documents = random_documents(100, seed=4, low=1)
    write_dataset(tmp_path / "ours", documents, dtype)
    write_with_megatron(tmp_path / "theirs", [[d] for d in documents], dtype)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=32, split="1,0,0", path_to_cache=None, tokenizer=_Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    samples = []
    for name in ("ours", "theirs"):
        low_level = GPTDataset.build_low_level_dataset(str(tmp_path / name), config)
        dataset = GPTDataset(low_level, str(tmp_path / name), np.arange(100), 50, Split.train, config)
        samples.append(torch.stack([dataset[i]["tokens"] for i in range(50)]))
    assert samples[0].unique().numel() > 500
    assert torch.equal(*samples)


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65535, 65536, 128256])
def test_dtype_is_megatrons_choice(vocab_size):
    assert dtype_for_vocab_size(vocab_size) == DType.optimal_dtype(vocab_size)


def test_flat_tokens_and_origins(tmp_path):
    documents = random_documents(50, seed=5)
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents(np.concatenate(documents), [len(d) for d in documents], [[0, i, i + 1] for i in range(50)])
        writer.add_document(np.array([7]))
        writer.finalize(metadata={"tokenizer": "t"}, sources=[{"path": "a.jsonl", "unit": "bytes"}])
    dataset = IndexedDataset(tmp_path / "a")
    np.testing.assert_array_equal(dataset.tokens(100, 200), np.concatenate(documents)[100:300])
    np.testing.assert_array_equal(dataset.gather(np.array([5, 3, 5])), np.concatenate(documents)[[5, 3, 5]])
    assert dataset.origins[[0, 49, 50]].tolist() == [[0, 0, 1], [0, 49, 50], [-1, 0, 0]]
    assert dataset.sidecar["metadata"] == {"tokenizer": "t"}
    with pytest.raises(IndexError):
        dataset.tokens(dataset.num_tokens - 1, 2)


def test_fingerprint_names_the_content_and_not_the_path(tmp_path):
    documents = random_documents(50, seed=6)
    first = write_dataset(tmp_path / "a", documents).fingerprint
    write_with_megatron(tmp_path / "b", [[d] for d in documents], np.int32)
    assert IndexedDataset(tmp_path / "b").fingerprint == first
    documents[20][0] += 1
    assert write_dataset(tmp_path / "c", documents).fingerprint != first


def test_empty_dataset_opens(tmp_path):
    dataset = write_dataset(tmp_path / "empty", [])
    assert (dataset.num_documents, dataset.num_tokens) == (0, 0)
    assert dataset.fingerprint


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: os.unlink(f"{p}.idx"), "no such file"),
        (lambda p: os.unlink(f"{p}.bin"), "no such file"),
        (lambda p: os.truncate(f"{p}.idx", 20), "shorter than a header"),
        (lambda p: os.truncate(f"{p}.idx", 100), "where its header"),
        (lambda p: os.truncate(f"{p}.bin", 10), "has 10"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"PAR1" * 20), "not an index"),
        (lambda p: Path(f"{p}.json").write_text("{}"), "no sidecar"),
        (lambda p: write_with_megatron(p, [[np.arange(9)]], np.int32), "another tool wrote it"),
    ],
)
def test_a_damaged_dataset_is_refused_in_one_line(tmp_path, damage, message):
    write_dataset(tmp_path / "a", random_documents(20, seed=7))
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message) as error:
        IndexedDataset(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A dataset with and without a sidecar: prefix, documents."""
    folder = tmp_path_factory.mktemp("fuzz")
    documents = [np.append(document, 7) for document in random_documents(6, seed=8, longest=9)]
    write_dataset(folder / "checked", documents, np.uint16)
    for part in ("bin", "idx", "json"):
        data = (folder / f"checked.{part}").read_bytes()
        (folder / f"damaged-checked.{part}").write_bytes(data)
        if part != "json":
            (folder / f"plain.{part}").write_bytes(data)
            (folder / f"damaged-plain.{part}").write_bytes(data)
    return folder, documents


def _read_all(prefix: Path) -> list[list[int]] | None:
    """All documents, or None where the dataset is refused."""
    try:
        dataset = IndexedDataset(prefix)
    except UserError:
        return None
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 160), patch=st.binary(min_size=1, max_size=40))
@example(start=128, patch=b"\x00\x01\x00\x00\x00\x00\x00\x00\x00\x81")  # borders so far apart that their difference overflows
def test_an_overwritten_index_never_reads_wrong(intact, start, patch):
    original = (intact[0] / "checked.idx").read_bytes()
    start %= len(original)
    check_damaged_index(*intact, original[:start] + patch + original[start + len(patch) :])


def test_no_flipped_bit_in_the_index_reads_wrong(intact):
    original = (intact[0] / "checked.idx").read_bytes()
    for bit in range(8 * len(original)):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        check_damaged_index(*intact, bytes(damaged))


def test_no_cut_or_grown_index_opens(intact):
    original = (intact[0] / "plain.idx").read_bytes()
    target = intact[0] / "length"
    Path(f"{target}.bin").write_bytes((intact[0] / "plain.bin").read_bytes())
    for damaged in [original[:length] for length in range(len(original))] + [original + b"\0", original * 2]:
        Path(f"{target}.idx").write_bytes(damaged)
        assert _read_all(target) is None


def test_lengths_that_add_up_but_are_negative_are_refused(tmp_path):
    write_with_megatron(tmp_path / "a", [[np.arange(5)], [np.arange(2)], [np.arange(5)]], np.int32)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[34:46] = np.array([5, -2, 9], "<i4").tobytes()
    index[46:70] = np.array([0, 20, 12], "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(UserError, match="lengths and pointers disagree"):
        IndexedDataset(tmp_path / "a")


def check_damaged_index(folder: Path, documents: list[np.ndarray], damaged: bytes) -> None:
    """A dataset with this index is refused or reads right, with and without the checksums of a sidecar."""
    original = (folder / "checked.idx").read_bytes()
    for name in ("checked", "plain"):
        (folder / f"damaged-{name}.idx").write_bytes(damaged)
        read = _read_all(folder / f"damaged-{name}")
        if damaged == original:
            assert read == [document.tolist() for document in documents]
        elif name == "checked":
            assert read is None
        elif read is not None:  # without checksums other borders between documents can look right, other tokens cannot
            assert [token for document in read for token in document] == np.concatenate(documents).tolist()
