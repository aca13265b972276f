"""Pipeline schedules as data: for each rank one list of actions, made by playing the pipeline on a clock (paper, section 3.3.2).

PP ranks, V chunks a rank, M micro-batches, N consecutive micro-batches of one chunk before the next chunk has its turn. Global chunk
`c` lies on rank `c % PP`. V = 1 gives 1F1B, V > 1 interleaved 1F1B (N = PP is depth-first, N = M breadth-first), and zero bubble splits
a backward into its input half (I) and its weight half (W), which fills the gaps. Any M >= 1 and N >= 1 work.
"""

from typing import NamedTuple


class Action(NamedTuple):
    """`kind`: F forward, B backward, I and W its halves, SEND_F/RECV_F an activation, SEND_B/RECV_B a gradient.

    `chunk` is the global chunk whose tensor it is: the producer's for a send, the consumer's for a receive. `peer` is the other rank.
    """

    kind: str
    chunk: int
    microbatch: int
    peer: int | None = None

    @property
    def is_message(self) -> bool:
        return self.peer is not None

    @property
    def lane(self) -> str:
        """Of a message: "F" for an activation, "B" for a gradient. Each lane has a group of its own, and keeps its own order."""
        return self.kind[-1]

    def __str__(self) -> str:
        return f"{self.kind}{self.chunk}.{self.microbatch}"


class Timed(NamedTuple):
    """An action on the schedule's clock, in units of one forward of one chunk."""

    start: int
    end: int
    action: Action


# Backward has two products for each of forward's: the input's gradient (I) and the weight's (W).
COSTS = {"F": 1, "I": 1, "W": 1, "B": 2}


def make_timeline(
    pp: int, chunks_per_rank: int, microbatches: int, group_size: int | None, zero_bubble: bool = False, forward_only: bool = False
) -> list[list[Timed]]:
    """What each rank computes and when, on a clock where F, I and W take 1 and B takes 2.

    A rank runs its next forward as long as its share of activations in flight lasts, else its next backward, else a waiting weight
    half. The share is what 1F1B holds: PP - rank, or 2 * (PP - rank - 1) + (V - 1) * N + 1 when interleaved. Zero bubble may hold as much
    on every rank as 1F1B does on the first, so that later ranks can put off their weight halves (ZB-H1 of arXiv 2401.10241).
    """
    group_size = min(group_size or pp, microbatches)
    ranks = [_Rank(r, pp, chunks_per_rank, microbatches, group_size, zero_bubble) for r in range(pp)]
    # An evaluation keeps nothing for a backward pass, so that nothing bounds how far a rank runs ahead.
    for rank in ranks if forward_only else ():
        rank.backwards, rank.share = [], len(rank.forwards)
        rank.memory = rank.share
    ends: dict[tuple[str, int, int], int] = {}
    last_chunk = pp * chunks_per_rank - 1
    now = 0
    while any(rank.has_work for rank in ranks):
        for rank in ranks:
            if rank.free_at <= now and (action := rank.choose(now, ends, last_chunk)):
                rank.free_at = now + COSTS[action.kind]
                rank.timeline.append(Timed(now, rank.free_at, action))
                # What the stage before waits for is the input's gradient, which I gives as B does.
                ends["B" if action.kind == "I" else action.kind, action.chunk, action.microbatch] = rank.free_at
        now += 1
    return [rank.timeline for rank in ranks]


class _Rank:
    def __init__(self, rank: int, pp: int, chunks: int, microbatches: int, group_size: int, zero_bubble: bool):
        own = [rank + pp * v for v in range(chunks)]  # this rank's global chunks
        groups = [range(m, min(m + group_size, microbatches)) for m in range(0, microbatches, group_size)]
        # N micro-batches of one chunk, then the same N of the next chunk, then the next N; backwards in the order of the chunks' return.
        self.forwards = [(c, m) for group in groups for c in own for m in group]
        self.backwards = [(c, m) for group in groups for c in reversed(own) for m in group]
        self.weights: list[tuple[int, int]] = []
        self.zero_bubble = zero_bubble
        # Activations in flight: what is forwarded while the first micro-batch goes down the pipeline and comes back.
        self.share = pp - rank if chunks == 1 else 2 * (pp - rank - 1) + (chunks - 1) * group_size + 1
        self.memory = self.share + (rank if chunks == 1 else 2 * rank)
        self.free_at = self.forwarded = self.backwarded = self.weighted = 0
        self.timeline: list[Timed] = []

    @property
    def has_work(self) -> bool:
        return self.forwarded < len(self.forwards) or self.backwarded < len(self.backwards) or self.weighted < len(self.weights)

    def choose(self, now: int, ends: dict, last_chunk: int) -> Action | None:
        if self.forwarded < len(self.forwards) and self._may_forward():
            chunk, m = self.forwards[self.forwarded]
            if chunk == 0 or ends.get(("F", chunk - 1, m), now + 1) <= now:
                self.forwarded += 1
                return Action("F", chunk, m)
        if self.backwarded < len(self.backwards):
            chunk, m = self.backwards[self.backwarded]
            needs = ("F", chunk, m) if chunk == last_chunk else ("B", chunk + 1, m)
            if ends.get(needs, now + 1) <= now and ends.get(("F", chunk, m), now + 1) <= now:
                return self._backward(chunk, m)
        if self.weighted < len(self.weights):
            self.weighted += 1
            return Action("W", *self.weights[self.weighted - 1])
        return None

    def _may_forward(self) -> bool:
        # A weight half that waits still holds its activations.
        in_memory = self.forwarded - (self.weighted if self.zero_bubble else self.backwarded)
        return self.forwarded - self.backwarded < self.share and in_memory < self.memory

    def _backward(self, chunk: int, m: int) -> Action:
        self.backwarded += 1
        if self.zero_bubble:
            self.weights.append((chunk, m))
            return Action("I", chunk, m)
        return Action("B", chunk, m)


def with_communication(timeline: list[list[Timed]], chunks: int) -> list[list[Action]]:
    """Each rank's actions with its sends, placed where the message is ready, and its receives, placed one computation before that.

    Every rank's list of messages of a lane is a part of one order over all events, so sends and receives of any two ranks match. A send
    that blocks until its receive is posted cannot deadlock: the first message of that order that has not arrived has nothing before it
    on either side but what is done.
    """
    pp = len(timeline)
    events: list[tuple[int, int, int, Action]] = []
    for rank, timed in enumerate(timeline):
        for start, end, action in timed:
            events.append((start, 1, rank, action))
            kind, step = ("F", 1) if action.kind == "F" else ("B", -1)
            to_chunk = action.chunk + step
            peer = to_chunk % pp
            # No message from a weight half, from the ends of the model, or between two chunks of one rank (PP 1).
            if action.kind == "W" or not 0 <= to_chunk < chunks or peer == rank:
                continue
            events.append((end, 0, rank, Action(f"SEND_{kind}", action.chunk, action.microbatch, peer)))
            events.append((end, 0, peer, Action(f"RECV_{kind}", to_chunk, action.microbatch, rank)))
    actions: list[list[Action]] = [[] for _ in timeline]
    for _, _, rank, action in sorted(events, key=_order_of_event):
        actions[rank].append(action)
    return [_receives_ahead(mine) for mine in actions]


def _receives_ahead(actions: list[Action]) -> list[Action]:
    """Each receive moved before the computation that it directly followed, past messages of the other lane but never of its own."""
    moved: list[Action] = []
    for action in actions:
        place = len(moved)
        if action.kind.startswith("RECV"):
            while place and moved[place - 1].is_message and moved[place - 1].lane != action.lane:
                place -= 1
            place = place - 1 if place and not moved[place - 1].is_message else len(moved)
        moved.insert(place, action)
    return moved


def _order_of_event(event: tuple[int, int, int, Action]) -> tuple:
    """By time; messages before the computations that start then; a message's send and receive together, by the message's name."""
    time, is_compute, rank, action = event
    if is_compute:
        return time, 1, rank, 0, 0
    is_backward = action.kind.endswith("B")
    receiver_offset = 0 if action.kind.startswith("SEND") else (1 if is_backward else -1)
    return time, 0, is_backward, action.chunk + receiver_offset, action.microbatch


def bubble_ratio(timeline: list[list[Timed]]) -> float:
    """Idle time over busy time, on the schedule's own clock (paper: (PP - 1) / (V * M) for interleaved 1F1B)."""
    total = max(timed[-1].end for timed in timeline)
    busy = sum(t.end - t.start for timed in timeline for t in timed)
    return total * len(timeline) / busy - 1
