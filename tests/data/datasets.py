"""Small datasets for tests, in which every token tells where it came from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_llama3.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter


def random_documents(count: int, seed: int, low: int = 0, high: int = 60000, longest: int = 40) -> list[np.ndarray]:
    """Documents of 0 to `longest` tokens, ids drawn from low to high."""
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, rng.integers(0, longest + 1)) for _ in range(count)]


def numbered_documents(lengths: Sequence[int], first_id: int = 0) -> list[np.ndarray]:
    """Documents in which every token id of the dataset occurs once: first_id, first_id + 1, ..."""
    return np.split(first_id + np.arange(sum(lengths)), np.cumsum(lengths)[:-1])


def write_dataset(prefix: str | Path, documents: Sequence[np.ndarray], dtype: type = np.int32) -> IndexedDataset:
    """Writes with our writer and opens it."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        writer.add_documents(np.concatenate([np.empty(0, np.int64), *documents]), [len(document) for document in documents])
        writer.finalize()
    return IndexedDataset(prefix)
