"""How long a checkpoint takes to load, with its checksums and without.

    python benchmarks/load.py --gigabytes 1.5 --rounds 5 --folder /tmp
    python benchmarks/load.py --gigabytes 1.5 --rounds 5 --folder /tmp --cold     # as root: drops the page cache before each load

One process reads a whole native checkpoint through torch.distributed.checkpoint, as `--load` does on each rank for its share.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megatron_llama3.checkpoint.lazy_tensor import WeightSource, from_tensor
from megatron_llama3.checkpoint.native import write_native
from megatron_llama3.checkpoint.native.checked_loading import CheckedReader
from megatron_llama3.checkpoint.native.metadata import SafeFileSystemReader
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.sharding import weight_table

DROP = Path("/proc/sys/vm/drop_caches")
READERS = {"with checksums": CheckedReader, "without": SafeFileSystemReader}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="fp32 weights of a model with layers of 68 MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each load")
    arguments = parser.parse_args()
    layers = max(1, round(arguments.gigabytes * 1e9 / (4 * 17e6)))
    model = ModelConfig(
        num_layers=layers, hidden_size=1024, ffn_hidden_size=4608, num_attention_heads=16, num_query_groups=8, vocab_size=4096
    )
    weights = {name: torch.randn(spec.shape) for name, spec in weight_table(model).items()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_native(WeightSource(model, {name: from_tensor(tensor) for name, tensor in weights.items()}), Path(folder))
        seconds = {how: [] for how in READERS}
        for _ in range(arguments.rounds):
            for how in READERS:
                if arguments.cold:
                    os.sync()
                    DROP.write_text("1")
                seconds[how].append(load(Path(folder) / "iter_0000000", weights, READERS[how]))
    size = sum(tensor.nbytes for tensor in weights.values())
    print(f"{size / 1e9:.2f} GB; {platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}; torch {torch.__version__}")
    for how, times in seconds.items():
        wall, cpu = (sorted(column) for column in zip(*times, strict=True))
        print(f"{how:15} median {statistics.median(wall):.2f} s, {wall[0]:.2f} to {wall[-1]:.2f}; CPU {statistics.median(cpu):.2f} s")


def load(folder: Path, weights: dict, reader: type) -> tuple[float, float]:
    state = {f"model.{name}": torch.empty_like(tensor) for name, tensor in weights.items()}
    started = time.monotonic(), time.process_time()
    dcp.load(state, storage_reader=reader(folder), no_dist=True)
    return time.monotonic() - started[0], time.process_time() - started[1]


if __name__ == "__main__":
    main()
