"""Datasets and a run's tokenizer of one vocabulary, or one line that says which two differ."""

import numpy as np
import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.same_tokenizer import check_same_tokenizer, vocabulary_hash
from megatron_llama3.tokenizer.llama3 import load_tokenizer
from tests.tools.preprocess_helpers import vocabulary_folder


@pytest.fixture
def tokenizer(tmp_path) -> str:
    return str(vocabulary_folder(tmp_path))


def dataset(prefix, vocabulary: str | None) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(9))
        writer.finalize({"job": {"--tokenizer-model": vocabulary}} if vocabulary else {})
    return IndexedDataset(str(prefix))


def test_what_agrees_or_says_nothing_passes(tmp_path, tokenizer):
    known = vocabulary_hash(load_tokenizer(tokenizer))
    datasets = [dataset(tmp_path / "a", known), dataset(tmp_path / "b", None), dataset(tmp_path / "c", known)]
    check_same_tokenizer(datasets, tokenizer)
    check_same_tokenizer(datasets[1:2], tokenizer)
    check_same_tokenizer([dataset(tmp_path / "d", "0" * 64)], None)


def test_two_datasets_or_dataset_and_tokenizer_that_differ_are_named(tmp_path, tokenizer):
    known = vocabulary_hash(load_tokenizer(tokenizer))
    other, same = dataset(tmp_path / "other", "0" * 64), dataset(tmp_path / "same", known)
    with pytest.raises(UserError, match=rf"{tmp_path}/same was made with tokenizer {known[:16]}, {tmp_path}/other with 0000000000000000"):
        check_same_tokenizer([other, same], None)
    with pytest.raises(UserError, match=rf"{tmp_path}/other was made with tokenizer 0+, --tokenizer-model {tokenizer} is {known[:16]}"):
        check_same_tokenizer([other], tokenizer)
