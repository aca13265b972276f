"""How long it takes to index a million documents and to blend 64 datasets, beside megatron-core in the same run.

    python benchmarks/data_index.py [--documents 1000000] [--samples 2000000]

Index: from an open dataset to the first sequence of a shuffled epoch; megatron-core's is GPTDataset's, of sequences of one length. Blend:
the source of every sample; the greatest distance of any source from its share, at any point, is printed beside the time. Ours is below 1
for all weights, megatron-core's for most.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_llama3.data.blend import integer_weights, next_sources
from megatron_llama3.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_llama3.data.packing import PackedDocuments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--datasets", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index(str(Path(folder) / "short"), arguments.documents)
    blend(arguments.datasets, arguments.samples)


def seconds(function: Callable, *args) -> tuple[float, object]:
    """Time of one call, and what it returned."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def index(prefix: str, documents: int) -> None:
    """Indexes documents of 1 to 20 tokens."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 21, documents)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_documents(rng.integers(0, 60000, lengths.sum()).astype(np.uint16), lengths)
        writer.finalize()

    class Tokenizer:
        vocab_size, eod, unique_identifiers = 60000, 0, {}

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=4096, split="1,0,0", path_to_cache=None, tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip

    def ours():
        return PackedDocuments(IndexedDataset(prefix), 0, documents, seed=1).read(0, 4097, 60000)

    def theirs():
        return GPTDataset(GPTDataset.build_low_level_dataset(prefix, config), prefix, np.arange(documents), None, Split.train, config)[0]

    print(f"index {documents:,} documents: ours {seconds(ours)[0]:.2f} s, megatron-core {seconds(theirs)[0]:.2f} s")


def blend(datasets: int, samples: int) -> None:
    """Blends datasets of random weights."""
    from megatron.core.datasets import helpers

    weights = np.random.default_rng(0).integers(1, 10000, datasets)
    time_ours, ours = seconds(lambda: next_sources(integer_weights(weights.tolist()), [0] * datasets, samples))
    theirs, theirs_sample = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    time_theirs, _ = seconds(helpers.build_blending_indices, theirs, theirs_sample, weights / weights.sum(), datasets, samples, False)
    print(f"blend {datasets} datasets, {samples:,} samples: ours {time_ours:.2f} s, megatron-core {time_theirs:.2f} s")
    print(f"greatest distance from its share: ours {distance(ours, weights):.6f} samples, megatron-core {distance(theirs, weights):.6f}")


def distance(drawn: np.ndarray, weights: np.ndarray) -> float:
    """max |given_i(n) - w_i n| over sources i and n."""
    n = np.arange(1, len(drawn) + 1)
    total = weights.sum()
    return max(int(np.abs(np.cumsum(drawn == i) * total - weight * n).max()) for i, weight in enumerate(weights)) / total


if __name__ == "__main__":
    main()
