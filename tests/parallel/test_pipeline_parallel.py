"""The executor on ranks that are threads, with sends that block as NCCL's may: gloo takes messages in any order, NCCL does not."""

import itertools
import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llama3.parallel import pipeline_parallel
from megatron_llama3.parallel.linear import Collectives, HowToRun, Linear, linear_layers
from megatron_llama3.parallel.pipeline_parallel import DeferredWeightGradients, PipelineExecutor
from megatron_llama3.parallel.schedule import Action, make_timeline, with_communication

GRID = [
    (pp, v, m, n, zero_bubble)
    for pp, v, m, zero_bubble in itertools.product([2, 3, 4], [1, 2, 3], [1, 3, 8], [False, True])
    for n in sorted({1, pp, pp + 1} if v > 1 else {pp})
]
WIDTH = 3


class DeadlockError(Exception):
    pass


@dataclass(eq=False)
class Message:
    wires: "Wires"
    peer: int
    tensor: Tensor
    is_send: bool
    has_moved: bool = False

    def wait(self) -> None:
        self.wires.block_until(self)

    def is_completed(self) -> bool:
        return self.has_moved


@dataclass
class Wires:
    """In place of torch.distributed, with (lane, rank) in place of a group.

    As in one NCCL communicator a lane: a rank's messages move in the order in which they were posted, whoever their peers are, and a send
    returns once its message has moved. Not `is_strict`: as in gloo, where a message only waits for its like from the same peer.
    """

    ranks: int
    is_strict: bool
    queues: dict[tuple[str, int], deque[Message]] = field(default_factory=lambda: defaultdict(deque))
    waited_for: list[Message] = field(default_factory=list)
    is_dead: bool = False

    def __post_init__(self):
        self.changed, self.running = threading.Condition(), self.ranks

    def isend(self, tensor: Tensor, group: tuple[str, int], group_dst: int) -> Message:
        message = self._post(group, Message(self, group_dst, tensor, is_send=True))
        if self.is_strict:
            message.wait()
        return message

    def irecv(self, tensor: Tensor, group: tuple[str, int], group_src: int) -> Message:
        return self._post(group, Message(self, group_src, tensor, is_send=False))

    def _post(self, group: tuple[str, int], message: Message) -> Message:
        with self.changed:
            self.queues[group].append(message)
            while any(self._move(group[0], *pair) for pair in itertools.permutations(range(self.ranks), 2)):
                self.changed.notify_all()
        return message

    def _move(self, lane: str, sender: int, receiver: int) -> bool:
        send = self._next(lane, sender, receiver, is_send=True)
        receive = self._next(lane, receiver, sender, is_send=False)
        if send is None or receive is None:
            return False
        receive.tensor.copy_(send.tensor)
        send.has_moved = receive.has_moved = True
        self.queues[lane, sender].remove(send)
        self.queues[lane, receiver].remove(receive)
        return True

    def _next(self, lane: str, rank: int, peer: int, is_send: bool) -> Message | None:
        queue = list(self.queues[lane, rank])[: 1 if self.is_strict else None]
        return next((m for m in queue if m.peer == peer and m.is_send == is_send), None)

    def block_until(self, message: Message) -> None:
        with self.changed:
            self.waited_for.append(message)
            while not message.has_moved:
                self.is_dead = self.is_dead or (len(self.waited_for) == self.running and not any(m.has_moved for m in self.waited_for))
                if self.is_dead:
                    self.changed.notify_all()
                    raise DeadlockError
                self.changed.wait()
            self.waited_for.remove(message)

    def one_has_ended(self) -> None:
        with self.changed:
            self.running -= 1
            self.changed.notify_all()


class Chunk(nn.Module):
    def __init__(self, number: int, linear):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float64))
        self.linear = linear

    def forward(self, x: Tensor | None, microbatch: Tensor) -> Tensor:
        return torch.tanh(self.linear(microbatch if x is None else x, self.weight))


def linear_of(deferred: DeferredWeightGradients):
    how = HowToRun(Linear(), Collectives(), deferred)
    return lambda x, weight: linear_layers(how, x, [weight])[0]


@dataclass
class Recorder:
    """Hooks and forwards in the order in which they came."""

    events: list[tuple[str, int]] = field(default_factory=list)

    def gather_ahead(self, chunk: int) -> None:
        self.events.append(("gather", chunk))

    def before_backward(self, chunk: int, reduces: bool, is_last: bool) -> None:
        self.events.append(("reduce" if reduces else "add up", chunk))

    def after_weight_half(self, chunk: int, reduces: bool, is_last: bool) -> None:
        pass


def loss_of(y: Tensor, microbatch: int) -> Tensor:
    return (y * (microbatch + 1)).sum()


def microbatches(count: int) -> list[Tensor]:
    return [torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(100 + m), dtype=torch.float64) for m in range(count)]


def play(
    actions: list[list[Action]], chunks: int, count: int, monkeypatch, is_strict: bool = True
) -> tuple[dict[int, Tensor], list[Recorder]]:
    """Gradients of every chunk's weight, and what each rank's hooks saw."""
    wires = Wires(len(actions), is_strict)
    monkeypatch.setattr(pipeline_parallel, "dist", wires)
    recorders = [Recorder() for _ in actions]

    def run(rank: int) -> dict[int, Tensor]:
        deferred = DeferredWeightGradients()
        halves = any(a.kind == "W" for a in actions[rank])
        own = {c: Chunk(c, linear_of(deferred) if halves else F.linear) for c in range(rank, chunks, len(actions))}
        for number, chunk in own.items():
            chunk.register_forward_hook(lambda *_, number=number: recorders[rank].events.append(("forward", number)))
            chunk.register_forward_hook(lambda *_: check_nothing_sent_is_held(executor, is_strict))
        lanes = {lane: (lane, rank) for lane in "FB"}
        executor = PipelineExecutor(actions[rank], own, chunks - 1, lanes, torch.device("cpu"), recorders[rank], deferred)
        try:
            executor.run(microbatches(count), loss_of, (1, WIDTH), torch.float64)
        finally:
            wires.one_has_ended()
        return {number: chunk.weight.grad for number, chunk in own.items()}

    with ThreadPoolExecutor(len(actions)) as ranks:
        results = [ranks.submit(run, rank) for rank in range(len(actions))]
    return {number: gradient for result in results for number, gradient in result.result().items()}, recorders


def check_nothing_sent_is_held(executor: PipelineExecutor, is_strict: bool) -> None:
    """A blocking send has moved by the next action."""
    assert not executor.leaving or not is_strict


def expected_gradients(chunks: int, count: int) -> dict[int, Tensor]:
    own = [Chunk(c, F.linear) for c in range(chunks)]
    for m, x in enumerate(microbatches(count)):
        for chunk in own:
            x = chunk(x, None)
        loss_of(x, m).backward()
    return {number: chunk.weight.grad for number, chunk in enumerate(own)}


def check(gradients: dict[int, Tensor], count: int) -> None:
    expected = expected_gradients(len(gradients), count)
    for number, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[number], rtol=1e-12, atol=1e-12)


def test_every_schedule_runs_where_sends_block_until_they_are_received(monkeypatch):
    for pp, v, m, n, zero_bubble in GRID:
        actions = with_communication(make_timeline(pp, v, m, n, zero_bubble), pp * v)
        gradients, _ = play(actions, pp * v, m, monkeypatch)
        check(gradients, m)


def test_a_receive_posted_before_a_send_of_its_lane_is_seen_and_gloo_would_not_see_it(monkeypatch):
    actions = with_communication(make_timeline(2, 2, 4, 2), 4)
    first = actions[0]
    place = next(i for i, a in enumerate(first) if a.kind == "RECV_F" and any(b.kind == "SEND_F" for b in first[:i]))
    earlier = max(i for i, a in enumerate(first[:place]) if a.kind == "SEND_F")
    first.insert(earlier, first.pop(place))
    gradients, _ = play(actions, 4, 4, monkeypatch, is_strict=False)
    check(gradients, 4)
    with pytest.raises(DeadlockError):
        play(actions, 4, 4, monkeypatch)


def test_swapped_sends_of_one_lane_give_wrong_gradients(monkeypatch):
    """All messages have one shape, so that only values show it."""
    actions = with_communication(make_timeline(2, 1, 4, 2), 2)
    sends = [i for i, a in enumerate(actions[0]) if a.kind == "SEND_F"]
    actions[0].insert(sends[1], actions[0].pop(sends[0]))
    gradients, _ = play(actions, 2, 4, monkeypatch)
    with pytest.raises(AssertionError):
        check(gradients, 4)


def test_the_next_chunks_weights_are_gathered_behind_the_first_forward_of_this_one(monkeypatch):
    _, recorders = play(with_communication(make_timeline(2, 3, 4, 2), 6), 6, 4, monkeypatch)
    for rank, recorder in enumerate(recorders):
        a, b, c = rank, rank + 2, rank + 4
        forwards = [event for event in recorder.events if event[0] in ("forward", "gather")]
        assert forwards[:8] == [
            *(("forward", a), ("gather", b), ("forward", a)),
            *(("forward", b), ("gather", c), ("forward", b)),
            *(("forward", c), ("forward", c)),
        ]
        assert [event for event in forwards if event[0] == "gather"] == [("gather", b), ("gather", c)]
