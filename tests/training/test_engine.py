"""What engines share: steps and evaluations under layouts against the plain reference, and the norm, its replicas and decay by hand."""

from types import SimpleNamespace

import pytest
import torch

from megatron_llama3.parallel.topology import Coordinates, Topology
from megatron_llama3.planning.equivalence import compare, train_reference, train_under
from megatron_llama3.training import engine as engine_module
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.fsdp2_engine import Fsdp2Engine
from tests.planning.faults import patch
from tests.training.layouts import AXES, config_of

PLAIN = {axis: values[0] for axis, values in AXES.items()} | {"kv_heads": 3}
LAYOUTS = {
    "one process": {"micro_batch": 2, "recompute": "full-block-1"},
    "pipeline": {"tp": 2, "sp": True, "pp": 2, "v": 2, "tied": True, "kv_heads": 1, "schedule": "zero-bubble"},
    "no sequence parallelism": {"tp": 2, "kv_heads": 2, "pp": 2, "tied": True, "qk_norm": True, "split": "embedding"},
    "data": {"dp": 2, "cp": 2, "positions": "reset"},
}


def evaluate_before_each_step() -> None:
    """An evaluation of a batch is its loss in training, weights gathered for it are freed, and no gradient is left."""
    released = []
    patch(Fsdp2Engine, "release_gathered_weights", lambda original, self: (released.append(self), original(self)))

    def checked(original, self, batch, objective) -> dict[str, float]:
        sums, count = self.evaluate(batch, objective)
        assert released.pop() is self
        assert not any(parameter.grad is not None for _, parameter in self.named_weights())
        means = original(self, batch, objective)
        assert sums.keys() | {"count"} == means.keys()
        assert (count, sums["loss"] / max(1, count)) == (means["count"], pytest.approx(means["loss"], rel=1e-12))
        return means

    patch(Engine, "forward_backward", checked)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_two_steps_equal_the_plain_reference(layout):
    config = config_of(PLAIN | layout)
    found = compare(train_under(config, 2, before=evaluate_before_each_step), train_reference(config, 2))
    assert max(found.loss, found.norm, found.gradient, found.later_norms, found.weight) <= 1e-10, found
    assert found.copies == 0, found


# --- by hand ---


def engine(tp: int = 2, tp_rank: int = 0, pp: int = 1, stage: int = 0, **weights) -> Engine:
    """An engine of nothing but what its small methods ask for; `weights` by name, as (is cut over TP, is tied, decays)."""
    made = object.__new__(Fsdp2Engine)
    made.tp = SimpleNamespace(size=tp, rank=tp_rank, sequence_parallel=True)
    made.groups = SimpleNamespace(
        topology=Topology(tp=tp, pp=pp), at=Coordinates(tp_rank, 0, stage, 0), is_last_stage=stage == pp - 1, device=torch.device("cpu")
    )
    made.specs = {
        name: SimpleNamespace(split_dim_at=lambda size, cut=cut: 0 if cut and size > 1 else None, is_tied=tied, decays=decays)
        for name, (cut, tied, decays) in weights.items()
    }
    return made


@pytest.mark.parametrize("tp_rank", [0, 1])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_replicas_count_once_in_the_norm(tp_rank, stage):
    found = engine(2, tp_rank, 3, stage, cut=(True, False, True), whole=(False, False, True), tied=(True, True, True))
    assert found.counts_in_norm("cut")
    assert found.counts_in_norm("whole") == (tp_rank == 0)
    assert [found.counts_in_norm("tied"), found.is_second_copy("tied")] == [stage != 2, stage == 2]
    assert [found.is_partial_over_ends(name) for name in ("cut", "whole", "tied")] == [False, False, True]


def test_a_tied_weight_has_no_second_copy_without_a_pipeline():
    found = engine(1, tied=(True, True, True))
    assert (found.is_partial_over_ends("tied"), found.is_second_copy("tied"), found.counts_in_norm("tied")) == (False, False, True)


@pytest.mark.parametrize("limit, scale", [(0.0, 1.0), (0.5, 0.1), (5.0, 1.0), (4.999, 0.9998), (6.0, 1.0), (1e-3, 2e-4)])
def test_clipping_scales_all_gradients_by_the_norm_of_those_that_count(monkeypatch, limit, scale):
    asked = []

    def all_reduce(square) -> None:
        asked.append((square.item(), square.dtype))
        square += 16.0  # other ranks'

    monkeypatch.setattr(engine_module.dist, "all_reduce", all_reduce)
    found = engine(2, 1, cut=(True, False, True), whole=(False, False, True), empty=(True, False, True))
    gradients = {"cut": torch.tensor([[2.0, -1.0], [2.0, 0.0]]), "whole": torch.tensor([7.0]), "empty": torch.empty(0, 3)}
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    found.owned_gradients = lambda: gradients
    assert found.clip_gradients(limit) == 5.0
    assert asked == [(9.0, torch.float64)]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, before[name] * scale, rtol=1e-6, atol=0)


def test_a_rank_without_gradients_still_takes_part_in_the_norm(monkeypatch):
    monkeypatch.setattr(engine_module.dist, "all_reduce", lambda square: square.add_(4.0))
    found = engine()
    found.owned_gradients = dict
    assert found.clip_gradients(1.0) == 2.0


@pytest.mark.parametrize("names, expected", [
    (("a", "norm", "b"), [(["a", "b"], 0.1), (["norm"], 0.0)]), (("norm",), [(["norm"], 0.0)]), (("b",), [(["b"], 0.1)]), ((), []),
])  # fmt: skip
def test_groups_of_weights_that_decay_and_do_not(names, expected):
    found = engine(a=(True, False, True), b=(True, False, True), norm=(False, False, False))
    found.config = SimpleNamespace(optimizer=SimpleNamespace(weight_decay=0.1))
    tensors = {name: torch.zeros(1) for name in names}
    groups = found._decay_groups(tensors)
    assert [([n for t in g["params"] for n in names if tensors[n] is t], g["weight_decay"]) for g in groups] == expected


@pytest.mark.parametrize("tp_rank, stage, counts", [(0, 1, True), (1, 1, False), (0, 0, False), (1, 0, False)])
def test_terms_are_summed_over_the_last_stage_once_a_tp_group(monkeypatch, tp_rank, stage, counts):
    monkeypatch.setattr(engine_module.dist, "all_reduce", lambda total: total.add_(100.0))
    total = engine(2, tp_rank, 2, stage)._sum_over_last_stage(torch.tensor([1.0, 2.0]))
    assert total.tolist() == ([101.0, 102.0] if counts else [100.0, 100.0])
