"""What one step computes and sends: every matrix product, all-gather and reduce-scatter once, none twice."""

from collections import Counter
from importlib.util import find_spec

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.planning.synthetic_batch import synthetic_batch
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.objectives import NextToken
from tests.training.layouts import config_of
from tests.training.test_equivalence import PLAIN

SEQUENCES, LAYERS, MATRICES = 4, 4, 7


class Calls(TorchDispatchMode):
    """Counts operators by name; a collective with its group, so that TP's and DP's are told apart."""

    def __init__(self, groups):
        super().__init__()
        self.counts: Counter = Counter()
        named = {"tp": groups.tp, "dp_cp": groups.dp_cp, "pp": groups.pp, "pp_gradients": groups.pp_gradients}
        self.names = {group.group_name: name for name, group in named.items()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace in ("c10d", "_c10d_functional"):
            owner = next((self.names[n] for n in map(_group_name, args) if n in self.names), "other")
            name = f"{owner} {name}"
        self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def _group_name(argument) -> str | None:
    """The name of a process group that came through the dispatcher: by itself, or as a script object."""
    if isinstance(argument, str):
        return argument
    try:
        return dist.ProcessGroup.unbox(argument).group_name
    except Exception:
        return None


def _count(config: RunConfig, evaluate: bool = False) -> Counter:
    groups = initialize_groups(config.parallel)
    engine = build_engine(config, groups)
    run = engine.evaluate if evaluate else engine.forward_backward
    for step in range(2):  # FSDP2 sets itself up in the first step
        with Calls(groups) as calls:
            run(synthetic_batch(config, step, groups.at.dp, groups.topology.dp), NextToken())
        if evaluate:
            continue
        engine.clip_gradients(1.0)
        engine.optimizer_step(1e-4)
    return calls.counts


def counts(evaluate: bool = False, sequences: int = SEQUENCES, **row) -> list[Counter]:
    config = config_of({**PLAIN, **row})
    config.model.num_layers = LAYERS
    config.training.global_batch_size = sequences
    config.training.loss_chunk_size = 1000
    return run_ranks(config.parallel.world_size, _count, config, evaluate)


def products(count: Counter) -> int:
    return sum(count[name] for name in ("mm", "addmm", "addmm_", "bmm"))


def sent(count: Counter, group: str, what: str) -> int:
    return sum(calls for name, calls in count.items() if name.startswith(group) and what in name)


def test_products_of_one_process():
    """A linear layer has three products, and so has the output layer with its loss."""
    (count,) = counts()
    assert products(count) == SEQUENCES * (LAYERS * MATRICES * 3 + 3)


def test_the_host_reads_numbers_off_the_device_once_a_step_and_not_once_a_micro_batch():
    """Each such read makes the host wait for a GPU: the token count (and all terms of the loss in one list, which the dispatcher does not
    see)."""
    (count,) = counts()
    assert count["_local_scalar_dense"] == 1


def test_an_evaluation_computes_no_gradients():
    (count,) = counts(evaluate=True)
    assert products(count) == SEQUENCES * (LAYERS * MATRICES + 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "v": 2}], ids=str)
def test_zero_bubble_computes_and_sends_what_1f1b_does(layout):
    plain, zero = (counts(**layout, tp=2, sp=True, schedule=schedule) for schedule in ("1f1b", "zero-bubble"))
    for a, b in zip(plain, zero):
        assert products(a) == products(b)
        assert {k: v for k, v in a.items() if " " in k} == {k: v for k, v in b.items() if " " in k}
    assert sum(map(products, plain)) == 2 * SEQUENCES * (LAYERS * MATRICES * 3 + 3), "TP 2: each rank does all of them, on half the columns"


@pytest.mark.slow
def test_sequence_parallel_collectives_of_a_step():
    """Two all-gathers and two reduce-scatters a layer forward, as many backward, where the two gathered inputs are gathered again; one
    pair each for embedding and output."""
    for count in counts(tp=2, sp=True):
        assert sent(count, "tp", "gather") == SEQUENCES * (LAYERS * 6 + 2)
        assert sent(count, "tp", "reduce_scatter") == SEQUENCES * (LAYERS * 4 + 2)
        assert count["tp allreduce_"] == SEQUENCES * 2 + 1, "two in the loss, and the norms' gradients once a step"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")
def test_deepspeeds_replicated_gradients_are_summed_in_one_bucket(stage):
    """Nine norms, and wk and wv where TP exceeds the KV heads: one sum over DP that puts their parts together, one over TP."""
    for count in counts(tp=2, sp=True, dp=2, engine=f"deepspeed-zero-{stage}"):
        assert count["tp allreduce_"] == SEQUENCES // 2 * 2 + 1


def test_each_weight_is_gathered_and_each_gradient_scattered_once_a_step():
    """FSDP2 sends a layer's weights as one: layers + 1 for embedding, norm and output, whatever the number of micro-batches."""
    for micro_batch in (1, 2):
        for count in counts(dp=2, micro_batch=micro_batch):
            assert sent(count, "dp_cp", "gather") == LAYERS + 1
            assert sent(count, "dp_cp", "reduce_scatter") == LAYERS + 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_interleaved_stages_gather_each_weight_once(schedule):
    for count in counts(dp=2, pp=2, v=2, schedule=schedule):
        assert sent(count, "dp_cp", "gather") == LAYERS // 2 + 1
        assert sent(count, "dp_cp", "reduce_scatter") == LAYERS // 2 + 1


@pytest.mark.parametrize("every, reductions", [(None, 1), (1, 2)])
def test_gradients_are_reduced_once_a_group_of_microbatches(every, reductions):
    for count in counts(dp=2, reduce_every=every):
        assert sent(count, "dp_cp", "gather") == LAYERS + 1
        assert sent(count, "dp_cp", "reduce_scatter") == reductions * (LAYERS + 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"v": 2}, {"schedule": "zero-bubble"}, {"v": 2, "schedule": "zero-bubble"}], ids=str)
def test_gradients_are_reduced_once_a_group_under_a_pipeline(layout):
    """4 micro-batches in groups of 3: one of three and one of the last alone. Under zero bubble the output layer's gradients, which are
    not put off, may all be there when the first group ends."""
    for count in counts(dp=2, pp=2, reduce_every=3, sequences=8, **layout):
        assert sent(count, "dp_cp", "gather") == LAYERS // 2 + 1
        missing = 2 * (LAYERS // 2 + 1) - sent(count, "dp_cp", "reduce_scatter")
        assert missing == 0 or (missing == 1 and "schedule" in layout)


def test_context_parallelism_gathers_keys_and_values_together():
    for count in counts(cp=2):
        assert sent(count, "other", "gather") == sent(count, "other", "reduce_scatter") == SEQUENCES * LAYERS
