"""How long a batch takes to read, from a cold disk and from memory, in blocks as training reads and in the old order of documents alone.

    python benchmarks/data_reading.py [--gigabytes 2] [--seq-length 8192] [--batch 16] [--folder FOLDER]

Documents of 100 to 2,000 tokens, and one dataset of documents of 1 to 2 million. Cold: the file's pages are given back to the system before
each kind; where a batch has been asked for (`read_ahead`), 0.2 s of nothing follow, in which a step would compute.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_llama3.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.data.packing import PackedDocuments

BATCHES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--folder", help="where to make the datasets (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, shortest, longest in (("short", 100, 2_000), ("long", 1_000_000, 2_000_000)):
            prefix = str(Path(folder) / name)
            write(prefix, int(arguments.gigabytes * 1e9) // 4, shortest, longest)
            for order in ("blocks", "documents alone"):
                report(prefix, f"{name} documents, {order}", order == "blocks", arguments.batch, arguments.seq_length)


def write(prefix: str, tokens: int, shortest: int, longest: int) -> None:
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        while tokens > 0:
            lengths = rng.integers(shortest, longest + 1, 2 + 2_000_000 // longest)
            writer.add_documents(rng.integers(0, 60_000, lengths.sum()).astype(np.int32), lengths)
            tokens -= int(lengths.sum())
        writer.finalize()


def report(prefix: str, name: str, in_blocks: bool, batch: int, seq_length: int) -> None:
    """One line: median milliseconds of a batch, cold, cold but asked for, and from memory."""
    times = [timed(prefix, in_blocks, batch, seq_length, ahead) for ahead in (False, True, None)]
    cold, ahead, warm = (f"{1000 * seconds:.1f}" for seconds in times)
    rate = batch * seq_length / times[2] / 1e6
    print(f"{name}: {cold} ms cold, {ahead} ms after reading ahead, {warm} ms from memory ({rate:.1f} M tokens/s)", flush=True)


def timed(prefix: str, in_blocks: bool, batch: int, seq_length: int, ahead: bool | None) -> float:
    """Median seconds of `next_batch`; `ahead` is None where the same batches were read before."""
    if ahead is not None:
        drop_from_cache(f"{prefix}.bin")
    stream = make_stream(prefix, in_blocks, seq_length)
    wanted, seconds = (batch, seq_length, batch, 0, 1), []
    for turn in range(BATCHES * (2 if ahead is None else 1)):
        if ahead:
            stream.read_ahead(*wanted)
            time.sleep(0.2)
        if ahead is None and turn == BATCHES:
            stream = make_stream(prefix, in_blocks, seq_length)
        start = time.perf_counter()
        stream.next_batch(*wanted)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[-BATCHES:]))


def make_stream(prefix: str, in_blocks: bool, seq_length: int) -> TrainingStream:
    dataset = IndexedDataset(prefix)
    stream = TrainingStream([PackedDocuments(dataset, 0, dataset.num_documents, 1)], [1], 60_000, 1, seq_length)
    if not in_blocks:
        stream.begin_as_in({"sources": [{"fingerprint": dataset.fingerprint}]})
    return stream


def drop_from_cache(path: str) -> None:
    os.sync()
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
