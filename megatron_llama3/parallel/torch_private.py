"""What the project calls of torch that torch does not promise to keep, in one place: a newer torch that lacks one of them fails
tests/parallel/test_torch_private.py before it fails a run. `torch._foreach_*`, which torch's own optimizers run on, is used as it is.
"""

import pickle

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.fsdp import FSDPModule, fully_shard


def finish_backward(module: FSDPModule) -> None:
    """What FSDP2 does after a backward pass through `module`, its root: accumulates gradients, and reduces them if it is to."""
    fully_shard.state(module)._root_post_backward_final_callback()


def default_store() -> dist.Store:
    """The store in which the ranks of this job met."""
    return dist.distributed_c10d._get_default_store()


def assert_on_device(condition: Tensor, message: str) -> None:
    """An assertion on a bool tensor that the host does not wait for."""
    torch._assert_async(condition, message)


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of a softmax's input from that of its output, over the last dimension, in one pass."""
    return torch.ops.aten._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def flatten(tensors: list[Tensor]) -> Tensor:
    """One flat copy of tensors of one dtype, back to back."""
    return _flatten_dense_tensors(tensors)


def unflatten(flat: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
    """Views of `flat` in the shapes of `like`."""
    return _unflatten_dense_tensors(flat, like)


def recorded_collectives() -> dict[str, bytes]:
    """Of each backend that has recorded any: this rank's last collectives, pickled, in the form that torch's fr_trace reads."""
    recorders = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}  # the first only where torch was built for GPUs
    module = torch._C._distributed_c10d
    traces = {backend: getattr(module, name)() for backend, name in recorders.items() if hasattr(module, name)}
    return {backend: trace for backend, trace in traces.items() if pickle.loads(trace)["entries"]}
