"""torch's writer of one rank's tensors, in several threads: a file each.

torch's own `thread_count` prints what goes wrong in any thread but the first and goes on: a full disk would leave a save without some
tensors that looks whole. Here each thread writes its share as a rank of one thread does, and what it raises ends the save.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_llama3.checkpoint.native.counted_files import CountedFiles
from megatron_llama3.parallel.tensor_parallel import local_part

MOST_THREADS = 4
BYTES_A_THREAD = 256 << 20


def threads_for(tensors: dict[str, torch.Tensor]) -> int:
    """Writer threads for what this rank holds of `tensors`: one for each 256 MiB, 4 at most."""
    held = sum(local_part(tensor).nbytes for tensor in tensors.values())
    return max(1, min(MOST_THREADS, held // BYTES_A_THREAD))


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """What ThreadedWriter wrote there on `rank`, by torch's names: `__RANK_0.distcp`, `__RANK_1_0.distcp`, and so on."""
    return sorted(folder.glob(f"__{rank}_*.distcp"))


class ThreadedWriter(dcp.FileSystemWriter):
    def __init__(self, folder: Path, threads: int):
        super().__init__(folder, sync_files=True)
        self.fs = CountedFiles()
        self.threads = threads
        self.starts: dict[str, list[int]] = {}
        """Of each file that was written, where its tensors begin."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Raises what the first thread that failed raised, after all have ended."""
        write = super().write_data
        with ThreadPoolExecutor(self.threads, thread_name_prefix="checkpoint-file") as pool:
            running = [pool.submit(lambda share: write(share, planner).wait(), share) for share in _shares(plan, self.threads)]
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        results = [result for share in running for result in share.result()]
        for place in (result.storage_data for result in results):
            self.starts.setdefault(place.relative_path, []).append(place.offset)
        written.set_result(results)
        return written


def _shares(plan: SavePlan, count: int) -> list[SavePlan]:
    """The plan in `count` parts of about equal bytes, without empty ones."""
    shares: list[list[WriteItem]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item in sorted(plan.items, key=_bytes, reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(item)
        sizes[smallest] += _bytes(item)
    prefix = plan.storage_data.prefix
    prefixes = [prefix, *(f"{prefix}{number}_" for number in range(1, count))]
    plans = [replace(plan, items=i, storage_data=replace(plan.storage_data, prefix=p)) for i, p in zip(shares, prefixes, strict=True)]
    return [part for part in plans if part.items]


def _bytes(item: WriteItem) -> int:
    """Of a tensor's part; nothing else is written here."""
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
