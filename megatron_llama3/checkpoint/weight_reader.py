"""A WeightSource as something that torch.distributed.checkpoint loads from: each rank reads the rows of its own shards, in any layout."""

from math import prod

from torch.distributed.checkpoint import StorageReader, metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_llama3.checkpoint.lazy_tensor import BLOCK_BYTES, WeightSource
from megatron_llama3.checkpoint.native.metadata import whole_tensors
from megatron_llama3.checkpoint.native.weights import MODEL_PREFIX
from megatron_llama3.training.progress import moved


class WeightReader(StorageReader):
    """Pass it to dcp.load as `storage_reader`; keys are "model.<name>". Values are converted to the dtype of what they are loaded into."""

    def __init__(self, source: WeightSource):
        self.weights = {MODEL_PREFIX + name: tensor for name, tensor in source.weights.items()}

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        return whole_tensors({key: (tensor.dtype, tensor.shape, "", 0, 0) for key, tensor in self.weights.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future:
        for item in plan.items:
            self._read(item, planner)
        done: Future = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        """A rectangle of one weight, a block of rows at a time."""
        source, target = self.weights[item.storage_index.fqn], planner.resolve_tensor(item).detach()
        (start, *others), (count, *widths) = item.storage_offsets, item.lengths
        columns = tuple(slice(offset, offset + width) for offset, width in zip(others, widths))
        step = max(1, BLOCK_BYTES // (prod(source.shape[1:]) * source.dtype.itemsize))
        for row in range(0, count, step):
            rows = source.rows(start + row, start + min(row + step, count))
            target[row : row + step].copy_(rows[(slice(None), *columns)])
            moved(rows.nbytes)
        planner.commit_tensor(item, target)

    # dcp.load asks these; there is nothing to prepare and one source to read from.

    def reset(self, checkpoint_id=None) -> None: ...

    def set_up_storage_reader(self, metadata: metadata.Metadata, is_coordinator: bool, *args, **kwargs) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return False
