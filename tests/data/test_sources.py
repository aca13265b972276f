"""--data-path and --split, held to megatron-core's parsing."""

from fractions import Fraction

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix, parse_and_normalize_split
from megatron.core.datasets.utils import get_blend_from_list

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.sources import open_sources, parse_data_path, split_bounds
from tests.data.datasets import numbered_documents, write_dataset


@pytest.mark.parametrize("split", ["969,30,1", "100,0,0", "1", "8,2", "99,1,0", "0.9,0.05,0.05", "0,1,0", "1/1/1"])
@pytest.mark.parametrize("count", [1, 2, 12, 33, 1000, 99_999])
def test_split_bounds_are_megatrons(split, count):
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for ours, theirs in zip(split_bounds(split, count), matrix, strict=True):
        if theirs is None:
            assert ours[0] == ours[1]
        else:
            assert ours == tuple(round(edge * float(count)) for edge in theirs)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "inf", "nan,1"])
def test_bad_splits_are_refused(split):
    with pytest.raises(UserError, match="--split"):
        split_bounds(split, 10)


@pytest.mark.parametrize("entries", [["a"], ["a", "b"], ["a", "b", "c"], ["0.3", "a", "0.7", "b"], ["1", "a"]])
def test_data_path_means_what_it_means_to_megatron(entries):
    prefixes, weights = parse_data_path(entries)
    their_prefixes, their_weights = get_blend_from_list(entries)
    assert prefixes == their_prefixes
    assert weights == (None if their_weights is None else [Fraction(str(weight)) for weight in their_weights])


@pytest.mark.parametrize("entries", [["0.3", "a", "b", "0.7"], ["a", "0.3", "b"], ["-1", "a", "1", "b"], ["0", "a"]])
def test_bad_data_paths_are_refused(entries):
    with pytest.raises(UserError, match="--data-path"):
        parse_data_path(entries)


def test_without_weights_datasets_blend_by_their_tokens(tmp_path):
    for name, lengths in (("a", [10, 20]), ("b", [60])):
        write_dataset(tmp_path / name, numbered_documents(lengths))
    _, weights = open_sources([str(tmp_path / "a"), str(tmp_path / "b")], None, 10_000, 1, None, None, 0)
    assert weights == [1, 2]


def test_a_dataset_beyond_the_vocabulary_is_refused_at_the_start(tmp_path):
    prefix = str(tmp_path / "a")
    write_dataset(prefix, [np.array([5, 900, 3]), np.array([7])])
    with pytest.raises(UserError, match=r"a.bin: holds token ids up to 900, --vocab-size 900 ends before"):
        open_sources([prefix], None, 900, 1, None, None, 0)
    open_sources([prefix], None, 901, 1, None, None, 0)
    (tmp_path / "a.json").unlink()  # as Megatron's own: held to the vocabulary batch by batch
    open_sources([prefix], None, 900, 1, None, None, 0)


def test_what_cannot_be_blended_is_refused(tmp_path, caplog):
    a, b, empty = (str(tmp_path / name) for name in ("a", "b", "empty"))
    write_dataset(a, numbered_documents([3] * 20))
    write_dataset(b, numbered_documents([3] * 20))
    write_dataset(empty, [])
    with pytest.raises(UserError, match="the same data"):
        open_sources([a, b], None, 10_000, 1, None, None, 0)
    with pytest.raises(UserError, match="empty: documents 0 to 0 of its 0 hold no token"):
        open_sources([a, empty], None, 10_000, 1, None, None, 0)
    with pytest.raises(UserError, match="nothing to validate on"):
        open_sources([a], None, 10_000, 1, None, "99,1,0", 1)
    write_dataset(b, numbered_documents([3] * 200))
    sources, _ = open_sources([a, b], None, 10_000, 1, None, "99,1,0", 1)
    assert [(source.first, source.last) for source in sources] == [(198, 200)]
    assert "validation goes without" in caplog.text
    assert np.array_equal(np.sort(sources[0].read(0, 6, 1000).tokens), np.arange(594, 600))
