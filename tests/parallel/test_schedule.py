"""Pipeline schedules as lists of actions: complete, in order, free of deadlock, with the paper's bubble and bounded memory."""

import itertools

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
        actions = with_communication(make_timeline(pp, v, m, n, zero_bubble), pp * v)
        stuck = [left[0] for left in play_with_rendezvous(actions) if left]
        assert not stuck, (pp, v, m, n, zero_bubble, list(map(str, stuck)))


def test_the_rendezvous_player_sees_a_deadlock():
    first, second = with_communication(make_timeline(2, 1, 2, 2), 2)
    sends = [i for i, a in enumerate(second) if a.kind == "SEND_B"]
    receives = [i for i, a in enumerate(second) if a.kind == "RECV_F"]
    second[sends[0]], second[receives[1]] = second[receives[1]], second[sends[0]]
    assert any(play_with_rendezvous([first, second]))


def play_with_rendezvous(actions: list[list[Action]]) -> list[list[Action]]:
    """Plays the lists where a send ends only once its receiver stands at the matching receive; returns what is left of each list."""
    left = [list(reversed(a)) for a in actions]
    moved = True
    while moved:
        moved = False
        for mine in left:
            while mine and not mine[-1].kind.startswith(("SEND", "RECV")):
                mine.pop()
                moved = True
            if mine and left[mine[-1].peer] and match(mine[-1], left[mine[-1].peer][-1]):
                left[mine[-1].peer].pop()
                mine.pop()
                moved = True
    return left


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
