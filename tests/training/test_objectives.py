"""What a step minimises: the objective alone, and an engine that knows of it only what the protocol says."""

import pytest
import torch
from torch import Tensor

from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.planning.synthetic_batch import synthetic_batch
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.microbatch import Microbatch
from megatron_llama3.training.objectives import NextToken
from tests.training.layouts import AXES, config_of

ROW = {axis: values[0] for axis, values in AXES.items()} | {"tp": 2, "sp": True, "cp": 2, "dp": 2}


def test_next_token_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]])
    m = Microbatch(inputs=None, loss_mask=torch.tensor([[True, False], [True, True]]))
    loss, sums = NextToken()(log_probs.requires_grad_(), m, cp=None)
    assert (loss.item(), sums.tolist(), sums.requires_grad) == (13.0, [13.0], False)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert torch.equal(gradient, -NextToken().loss_weights(m))


class Squares:
    """Half the sum of squared log-probabilities over all tokens: no weighted sum of them, another count, and a second term."""

    terms = ("loss", "tokens")

    def count(self, batch) -> int:
        return batch.tokens.size

    def loss_weights(self, m: Microbatch) -> None:
        return None

    def __call__(self, log_probs: Tensor, m: Microbatch, cp) -> tuple[Tensor, Tensor]:
        loss = log_probs.square().sum() / 2
        return loss, torch.stack([loss.detach(), torch.tensor(float(log_probs.numel()), dtype=loss.dtype)])


def _norm_and_terms(config, objective) -> tuple:
    groups = initialize_groups(config.parallel)
    engine = build_engine(config, groups)
    batch = synthetic_batch(config, 0, groups.at.dp, groups.topology.dp)
    evaluated, count = engine.evaluate(batch, objective)
    trained = engine.forward_backward(batch, objective)
    return engine.clip_gradients(0.0), trained, evaluated, count


@pytest.mark.parametrize("objective", [NextToken(), Squares()], ids=lambda o: type(o).__name__)
def test_an_objective_has_the_same_terms_and_gradients_under_a_layout(objective):
    config = config_of(ROW)
    ranks = run_ranks(8, _norm_and_terms, config, objective)
    config.parallel = type(config.parallel)()
    ((norm, trained, evaluated, count),) = run_ranks(1, _norm_and_terms, config, objective)
    for theirs in ranks:
        assert theirs[3] == count
        assert theirs[0] == pytest.approx(norm, rel=1e-12)
        for ours, expected in ((theirs[1], trained), (theirs[2], evaluated)):
            assert ours == pytest.approx(expected, rel=1e-12)
    means = {term: total / count for term, total in evaluated.items()}
    assert trained == pytest.approx(means | {"count": count}, rel=1e-12)
    assert trained.get("tokens", 1.0) == pytest.approx(1.0)
