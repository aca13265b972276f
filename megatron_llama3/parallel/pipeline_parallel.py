"""Runs a rank's list of pipeline actions: forwards, backwards or their halves, and the messages between stages.

The executor knows no model: a chunk is called as `chunk(x, microbatch)`, and `on_loss` turns the last chunk's output into a scalar.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from megatron_llama3.parallel.linear import KeptInput, Linear
from megatron_llama3.parallel.schedule import Action

WeightHalf = tuple[KeptInput, list[tuple[Tensor, Tensor]]]
"""The kept input of layers that share it, and (weight, gradient of its output) of each."""


class DeferredWeightGradients:
    """Puts off the weights' half of a backward pass, and runs it later (zero bubble)."""

    def __init__(self, linear: Linear | None = None):
        self.linear = linear or Linear()
        self._put_off: list[WeightHalf] = []

    def defer(self, kept: KeptInput, grads: list[tuple[Tensor, Tensor]]) -> None:
        self._put_off.append((kept, grads))

    def take(self) -> list[WeightHalf]:
        """What the backward passes since the last call put off."""
        halves = self._put_off[:]
        self._put_off.clear()
        return halves

    @torch.no_grad()
    def run(self, halves: list[WeightHalf]) -> None:
        """The weight half: each product, passed on to the parameter through the autograd graph that made the local weight of it. The
        next layers' input is gathered meanwhile."""
        arriving = halves[-1][0].start() if halves else None
        while halves:
            (_, grads), x = halves.pop(), arriving()
            arriving = halves[-1][0].start() if halves else None
            while grads:
                weight, grad = grads.pop()
                torch.autograd.backward(weight, self.linear.weight_gradient(grad, x))


class EngineHooks(Protocol):
    """What a data-parallel engine does around the passes of a chunk. `reduces`: what the chunk has accumulated is reduced after this
    backward, the last of a group of micro-batches or of the step. `is_last`: the chunk's last one of this step."""

    def gather_ahead(self, chunk: int) -> None: ...

    def before_backward(self, chunk: int, reduces: bool, is_last: bool) -> None: ...

    def after_weight_half(self, chunk: int, reduces: bool, is_last: bool) -> None: ...


class PipelineExecutor:
    """One step of one rank. `chunks`: global chunk number -> module. `lanes`: the pipeline's group for activations ("F") and the one for
    gradients ("B"). `reduce_every`: micro-batches between two reductions of a chunk's gradients; None for one a step."""

    def __init__(
        self,
        actions: list[Action],
        chunks: dict[int, Callable],
        last_chunk: int,
        lanes: dict[str, dist.ProcessGroup],
        device: torch.device,
        hooks: EngineHooks,
        deferred: DeferredWeightGradients | None = None,
        reduce_every: int | None = None,
    ):
        self.actions, self.chunks, self.last_chunk = actions, chunks, last_chunk
        self.lanes, self.device, self.hooks, self.deferred, self.reduce_every = lanes, device, hooks, deferred, reduce_every
        # Each chunk's first forward, in the order of the list: the next chunk's weights are gathered behind it.
        first_forwards = {a.chunk: a for a in reversed(actions) if a.kind == "F"}
        in_order = sorted(first_forwards.values(), key=actions.index)
        self._chunk_after = {first: following.chunk for first, following in pairwise(in_order)}
        self._last_of_chunk = {(a.kind, a.chunk): a for a in actions}

    def run(
        self, microbatches: list, on_loss: Callable[[Tensor, int], Tensor], boundary_shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Plays the list. `on_loss(output, microbatch number)` is called on the last stage only; `boundary_shape` and `dtype` are those of
        the activation between stages, the same for all micro-batches of a step."""
        self.microbatches, self.on_loss = microbatches, on_loss
        self.boundary = {"size": boundary_shape, "dtype": dtype, "device": self.device}
        self._one = torch.ones((), device=self.device, dtype=torch.promote_types(dtype, torch.float32))
        # By (chunk, micro-batch): leaves that the chunk read, outputs to be sent, their edges into the graph, gradients to be sent.
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.edges: dict = {}
        self.grads: dict[tuple[int, int], Tensor] = {}
        self.arriving: dict = {}
        self.weight_halves: dict = {}
        self.leaving: list[tuple[dist.Work, Tensor]] = []
        for action in self.actions:
            # A tensor that is on its way must live until it has left.
            self.leaving = [sent for sent in self.leaving if not sent[0].is_completed()]
            self._COMMANDS[action.kind](self, action)
        for work, _tensor in self.leaving:
            work.wait()

    def _receive(self, action: Action) -> None:
        tensor, group = torch.empty(**self.boundary), self.lanes[action.lane]
        self.arriving[action.kind, action.chunk, action.microbatch] = tensor, dist.irecv(tensor, group=group, group_src=action.peer)

    def _send(self, action: Action) -> None:
        store = self.outputs if action.kind == "SEND_F" else self.grads
        tensor = store.pop((action.chunk, action.microbatch))
        self.leaving.append((dist.isend(tensor, group=self.lanes[action.lane], group_dst=action.peer), tensor))

    def _arrived(self, kind: str, action: Action, store: dict, neighbour: int) -> Tensor:
        """The message for this action: received, or handed over by the neighbouring chunk on this rank."""
        key = (kind, action.chunk, action.microbatch)
        if key not in self.arriving:
            return store.pop((neighbour, action.microbatch))
        tensor, work = self.arriving.pop(key)
        work.wait()
        return tensor

    def _forward(self, action: Action) -> None:
        key, x = (action.chunk, action.microbatch), None
        if action.chunk > 0:
            x = self._arrived("RECV_F", action, self.outputs, action.chunk - 1)
        if x is not None and torch.is_grad_enabled():
            self.inputs[key] = x.requires_grad_()  # a leaf: its .grad is what the stage before is sent
        y = self.chunks[action.chunk](x, self.microbatches[action.microbatch])
        if action in self._chunk_after:  # behind this chunk's own weights, and beside its further forwards
            self.hooks.gather_ahead(self._chunk_after[action])
        if action.chunk == self.last_chunk:
            y = self.on_loss(y, action.microbatch)
        else:
            self.outputs[key] = y.detach()
        # The graph is kept by its edge, so that the output itself is freed once it is sent.
        self.edges[key] = get_gradient_edge(y) if y.requires_grad else None

    def _backward(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        self.hooks.before_backward(action.chunk, *(self._reduces_and_is_last(action) if action.kind == "B" else (False, False)))
        grad = None
        if action.chunk != self.last_chunk:
            grad = self._arrived("RECV_B", action, self.grads, action.chunk + 1)
        edge = self.edges.pop(key)
        if edge is not None:
            torch.autograd.backward([edge], [grad if grad is not None else self._one])
        if action.chunk > 0:
            x = self.inputs.pop(key)
            self.grads[key] = torch.zeros(**self.boundary) if x.grad is None else x.grad
        if action.kind == "I":
            self.weight_halves[key] = self.deferred.take()

    def _weight_half(self, action: Action) -> None:
        self.deferred.run(self.weight_halves.pop((action.chunk, action.microbatch)))
        self.hooks.after_weight_half(action.chunk, *self._reduces_and_is_last(action))

    def _reduces_and_is_last(self, action: Action) -> tuple[bool, bool]:
        is_last = self._last_of_chunk[action.kind, action.chunk] is action
        ends_group = self.reduce_every is not None and (action.microbatch + 1) % self.reduce_every == 0
        return is_last or ends_group, is_last

    _COMMANDS = {
        "F": _forward,
        "B": _backward,
        "I": _backward,
        "W": _weight_half,
        "RECV_F": _receive,
        "RECV_B": _receive,
        "SEND_F": _send,
        "SEND_B": _send,
    }
