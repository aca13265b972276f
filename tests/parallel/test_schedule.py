"""Pipeline schedules as lists of actions: complete, in order, free of deadlock, with the paper's bubble and bounded memory."""

import itertools
from collections import deque

import pytest

from megatron_llama3.parallel.schedule import Action, Timed, bubble_ratio, make_timeline, with_communication

GRID = [
    (pp, v, m, n, zero_bubble)
    for pp, v, m, zero_bubble in itertools.product([1, 2, 3, 4, 8], [1, 2, 3], [1, 2, 3, 5, 8, 10, 16], [False, True])
    for n in sorted({1, 2, pp, 5, m} if v > 1 else {pp})
    if pp > 1 or v == 1
]


def computations(timeline: list[list[Timed]]) -> list[Action]:
    return [t.action for timed in timeline for t in timed]


def test_every_forward_and_backward_happens_once_on_its_rank():
    for pp, v, m, n, zero_bubble in GRID:
        timeline = make_timeline(pp, v, m, n, zero_bubble)
        kinds = ("F", "I", "W") if zero_bubble else ("F", "B")
        expected = sorted(Action(k, c, i) for k in kinds for c in range(pp * v) for i in range(m))
        assert sorted(computations(timeline)) == expected, (pp, v, m, n, zero_bubble)
        for rank, timed in enumerate(timeline):
            assert all(t.action.chunk % pp == rank for t in timed)
            assert all(a.end <= b.start for a, b in itertools.pairwise(timed))


def test_nothing_starts_before_what_it_needs_has_ended():
    for pp, v, m, n, zero_bubble in GRID:
        timeline = make_timeline(pp, v, m, n, zero_bubble)
        ends = {("B" if t.action.kind == "I" else t.action.kind, *t.action[1:3]): t.end for timed in timeline for t in timed}
        for t in itertools.chain(*timeline):
            kind, chunk, i, _ = t.action
            needs = {
                "F": [("F", chunk - 1, i)] if chunk else [],
                "B": [("F", chunk, i)] + ([("B", chunk + 1, i)] if chunk < pp * v - 1 else []),
                "W": [("B", chunk, i)],
            }["B" if kind == "I" else kind]
            assert all(ends[need] <= t.start for need in needs), (pp, v, m, n, zero_bubble, t)


def test_blocking_rendezvous_sends_do_not_deadlock():
    for pp, v, m, n, zero_bubble in GRID:
        stuck = play_with_rendezvous(with_communication(make_timeline(pp, v, m, n, zero_bubble), pp * v))
        assert not stuck, (pp, v, m, n, zero_bubble, stuck)


def test_the_rendezvous_player_sees_a_deadlock():
    first, second = with_communication(make_timeline(2, 1, 2, 2), 2)
    sends = [i for i, a in enumerate(second) if a.kind == "SEND_B"]
    receives = [i for i, a in enumerate(second) if a.kind == "RECV_F"]
    second[sends[0]], second[receives[1]] = second[receives[1]], second[sends[0]]
    assert not play_with_rendezvous([first, second]), "a receive that is posted early waits for nothing"
    last = [i for i, a in enumerate(first) if a.kind == "SEND_F"][-1]
    first.append(first.pop(last))  # rank 0 waits for gradients first, and rank 1 for the activation that they come from
    assert play_with_rendezvous([first, second])


def play_with_rendezvous(actions: list[list[Action]]) -> list[Action]:
    """Plays the lists where a send ends only once its message has moved, and a rank's messages of a lane move in the order in which they
    were posted, to and from whichever rank. Returns what could not be done."""
    left = [deque(mine) for mine in actions]
    queues = {(rank, lane): deque() for rank in range(len(actions)) for lane in "FB"}
    under_way: set[tuple] = set()
    holding_up: list[set[tuple]] = [set() for _ in actions]
    progress = True
    while progress:
        progress = move_messages(queues, under_way)
        for rank, mine in enumerate(left):
            while mine and not (holding_up[rank] | received_for(rank, mine[0])) & under_way:
                action, progress = mine.popleft(), True
                if action.is_message:
                    under_way.add((rank, *action[:3]))
                    queues[rank, action.lane].append(action)
                    holding_up[rank] = {(rank, *action[:3])} if action.kind.startswith("SEND") else set()
    return [*itertools.chain(*left), *itertools.chain(*queues.values())]


def move_messages(queues: dict[tuple[int, str], deque[Action]], under_way: set[tuple]) -> bool:
    """Every message that both its ranks stand at."""
    moved = False
    for (rank, lane), queue in queues.items():
        while queue and (other := queues[queue[0].peer, lane]) and match(queue[0], other[0]):
            under_way -= {(rank, *queue[0][:3]), (queue[0].peer, *other[0][:3])}
            queue.popleft(), other.popleft()
            moved = True
    return moved


def received_for(rank: int, action: Action) -> set[tuple]:
    """The message that a computation waits for, if it comes from another rank."""
    return {(rank, f"RECV_{'F' if action.kind == 'F' else 'B'}", *action[1:3])} if action.kind in "FBI" else set()


def test_receives_are_posted_one_computation_before_they_are_needed():
    """All that can be: none before the rank has anything to compute, or before an earlier message of its own lane."""
    for pp, v, m, n, zero_bubble in GRID:
        for mine in with_communication(make_timeline(pp, v, m, n, zero_bubble), pp * v):
            for i, action in enumerate(mine):
                if not action.kind.startswith("RECV"):
                    continue
                used = next(j for j, a in enumerate(mine) if (0, *action[:3]) in received_for(0, a))
                between = [a for a in mine[i:used] if not a.is_message]
                before = list(itertools.takewhile(lambda a: a.is_message, reversed(mine[:i])))
                starts, is_behind = len(before) == i, any(a.lane == action.lane and a.kind.startswith("SEND") for a in before)
                assert i < used, (pp, v, m, n, zero_bubble, action)
                assert between or starts or is_behind, (pp, v, m, n, zero_bubble, action)


def match(a: Action, b: Action) -> bool:
    send, receive = (a, b) if a.kind.startswith("SEND") else (b, a)
    step = 1 if send.kind == "SEND_F" else -1
    same_message = (send.chunk + step, send.microbatch) == receive[1:3]
    return same_message and (send.kind, receive.kind) in (("SEND_F", "RECV_F"), ("SEND_B", "RECV_B"))


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
def test_bubble_of_1f1b_and_interleaved_is_the_papers(pp):
    """(PP - 1) / (V * M), section 3.3.2: any M for V = 1, whole groups of N = PP for V > 1."""
    for m in (1, 3, pp, 2 * pp, 2 * pp + 1):
        assert bubble_ratio(make_timeline(pp, 1, m, None)) == pytest.approx((pp - 1) / m)
    for v in (2, 4):
        for m in (pp, 2 * pp):
            assert bubble_ratio(make_timeline(pp, v, m, pp)) == pytest.approx((pp - 1) / (v * m))


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_zero_bubble_leaves_a_third_of_the_bubble(pp):
    """ZB-H1: weight halves fill all but one forward a rank ahead of the first."""
    for v, m in ((1, 4 * pp), (2, 2 * pp)):
        assert bubble_ratio(make_timeline(pp, v, m, pp, zero_bubble=True)) == pytest.approx((pp - 1) / (3 * v * m))


def test_activations_in_flight_are_bounded():
    """As in 1F1B, on each rank; in zero bubble, where weight halves are put off, as on 1F1B's first rank."""
    for pp, v, m, n, zero_bubble in GRID:
        for rank, timed in enumerate(make_timeline(pp, v, m, n, zero_bubble)):
            held_until_weights = peak(timed, {"F": 1, "B": -1, "W": -1})
            waiting_for_backward = peak(timed, {"F": 1, "B": -1, "I": -1})
            assert waiting_for_backward <= min(share(pp, v, min(n, m), rank), v * m), (pp, v, m, n, zero_bubble, rank)
            assert held_until_weights <= min(share(pp, v, min(n, m), 0 if zero_bubble else rank), v * m), (pp, v, m, n, zero_bubble, rank)


def share(pp: int, v: int, n: int, rank: int) -> int:
    return pp - rank if v == 1 else 2 * (pp - rank - 1) + (v - 1) * n + 1


def peak(timed: list[Timed], changes: dict[str, int]) -> int:
    return max(itertools.accumulate(changes.get(t.action.kind, 0) for t in timed))


def test_the_papers_figure_6():
    """4 ranks, 8 chunks, M = 10, N = 5: rank 0 runs micro-batches 0 to 4 of chunk 0, then of chunk 4, then the next five."""
    first = [t.action for t in make_timeline(4, 2, 10, 5)[0]]
    forwards = [(a.chunk, a.microbatch) for a in first if a.kind == "F"]
    assert forwards == [(c, m) for group in (range(5), range(5, 10)) for c in (0, 4) for m in group]
    backwards = [(a.chunk, a.microbatch) for a in first if a.kind == "B"]
    assert backwards == [(c, m) for group in (range(5), range(5, 10)) for c in (4, 0) for m in group]
    kinds = "".join(a.kind for a in first)
    warm_up = kinds.index("B")
    assert warm_up == 2 * 3 + 5 + 1
    assert set(kinds[warm_up : warm_up + 16]) == {"F", "B"}


def test_forward_only_is_all_forwards():
    timeline = make_timeline(3, 2, 5, 3, forward_only=True)
    assert {a.kind for a in computations(timeline)} == {"F"}
    assert len(computations(timeline)) == 3 * 2 * 5


def test_messages_are_those_between_neighbouring_chunks_on_different_ranks():
    actions = with_communication(make_timeline(2, 2, 3, 2), 4)
    sends = [(r, a.kind, a.chunk, a.peer) for r, mine in enumerate(actions) for a in mine if a.kind.startswith("SEND")]
    assert len(sends) == 3 * 2 * 3
    assert set(sends) == {(r, k, c, 1 - r) for r, k, c in [(0, "SEND_F", 0), (1, "SEND_F", 1), (0, "SEND_F", 2)]} | {
        (r, k, c, 1 - r) for r, k, c in [(1, "SEND_B", 3), (0, "SEND_B", 2), (1, "SEND_B", 1)]
    }
    alone = with_communication(make_timeline(1, 1, 3, None), 1)
    assert {a.kind for a in alone[0]} == {"F", "B"}
