"""Data for the recipes' tests."""

import numpy as np
import pytest

from megatron_llama3.data.dataset_writer import IndexedDatasetWriter


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    prefix = tmp_path_factory.mktemp("data") / "corpus"
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in rng.integers(5, 60, 80):
            writer.add_document(rng.integers(0, 101, length))
        writer.finalize()
    return str(prefix)
