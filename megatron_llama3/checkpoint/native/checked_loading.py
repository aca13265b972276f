"""torch.distributed.checkpoint's loading, held to what was saved: checksums of what is read, and every element of what is loaded into."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from megatron_llama3.checkpoint.native.checksums import ADVICE, Checksums, DamagedCheckpointError
from megatron_llama3.checkpoint.native.metadata import SafeFileSystemReader, overlap
from megatron_llama3.parallel.tensor_parallel import local_part


class CheckedReader(SafeFileSystemReader):
    """Holds each part that this rank needs to the manifest before torch reads it, file by file. Both pass over the same bytes, and the
    second finds them in the page cache: a copy in memory could be as large as the largest tensor."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._checksums = Checksums(folder)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Raises DamagedCheckpointError for bytes that are not those that were saved."""
        files: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            files[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in files.items():
            for item in items:
                place = self.storage_data[item.storage_index]
                self._checksums.check(name, place.offset, place.length)
            super().read_data(replace(plan, items=items), planner)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done


class CoveringPlanner(DefaultLoadPlanner):
    """Raises DamagedCheckpointError where the stored chunks leave out a part of what this rank loads: it would keep its first values."""

    def __init__(self, path: Path):
        """`path` is for the error."""
        super().__init__()
        self.path = path

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        items: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            items[item.dest_index.fqn].append(item)
        for key, tensor in self.state_dict.items():
            parts = [(tuple(item.dest_offsets), tuple(item.lengths)) for item in items[key]]
            if sum(torch.Size(sizes).numel() for _, sizes in parts) != local_part(tensor).numel() or overlap(parts):
                raise DamagedCheckpointError(f"{self.path}: its chunks of {key} do not cover the shape {list(tensor.shape)}; {ADVICE}")
        return plan
