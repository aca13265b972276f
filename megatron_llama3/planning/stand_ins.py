"""What a run under fake tensors on a CPU puts in the place of code that needs a GPU or real values: a norm that keeps what the GPU's keeps,
weights that are not drawn, meshes and micro-batches made outside the fake mode. The attention kernel is the GPU's own: its custom operator
knows the shapes of its results on any device.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes

from megatron_llama3.model import llama, norm
from megatron_llama3.training import engine


class FusedNorm(Function):
    """Keeps its input, its weight and 1 / rms, as apex's and CUDA's kernels do; torch's own takes itself apart on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32)))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


class _Sent:
    """A message that has left: torch's fake backend never says so of its own, and the executor would keep every tensor it sent."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        return None


@contextmanager
def stand_ins(fake: FakeTensorMode) -> Iterator[None]:
    """While it lasts, engines can be built and steps be run under `fake`."""
    with ExitStack() as stack:
        for owner, name, value in (
            (norm, "fused_norm", lambda: ("stand-in", FusedNorm.apply)),
            (llama, "initial_weight", lambda name, spec, seed, size, rank: torch.empty(spec.local_shape(size, rank))),
            (llama, "choose_kernel", lambda name, device, dtype: "varlen"),
            (engine, "make_microbatches", _made_fake(engine.make_microbatches, fake)),
            (dist, "isend", lambda *args, **kwargs: _Sent()),
            (DeviceMesh, "__init__", _real(DeviceMesh.__init__)),
            (DeviceMesh, "__getitem__", _real(DeviceMesh.__getitem__)),
            (DeviceMesh, "_concatenate", staticmethod(_real(DeviceMesh._concatenate))),
            (DeviceMesh, "from_group", staticmethod(_real(DeviceMesh.from_group))),
        ):
            stack.enter_context(replaced(owner, name, value))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _real(function):
    """`function` outside every mode, on real tensors."""

    @wraps(function)
    def run(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def _made_fake(make_microbatches, fake: FakeTensorMode):
    """Made of numpy arrays, which fake tensors cannot be, and turned into fake ones then."""

    def make(*args):
        with _disable_current_modes():
            microbatches = make_microbatches(*args)
        return [
            microbatch._replace(inputs=_fake_fields(microbatch.inputs, fake), loss_mask=fake.from_tensor(microbatch.loss_mask))
            for microbatch in microbatches
        ]

    return make


def _fake_fields(inputs: llama.ModelInputs, fake: FakeTensorMode) -> llama.ModelInputs:
    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    return replace(inputs, **{name: fake.from_tensor(tensor) for name, tensor in tensors.items()})
