"""When the FSDP2 engine gathers weights."""

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.planning.equivalence import synthetic_batch
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.objectives import NextToken
from tests.training.layouts import config_of
from tests.training.test_equivalence import PLAIN


class Gathers(TorchDispatchMode):
    """Notes each all-gather in `events`."""

    def __init__(self, events: list):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "allgather" in function.overloadpacket.__name__:
            self.events.append("gather")
        return function(*args, **(kwargs or {}))


def _order_of_a_step(config: RunConfig) -> list:
    """All-gathers and the chunks' forwards, as they end, in the second step."""
    groups = initialize_groups(config.parallel)
    engine = build_engine(config, groups)
    events: list = []
    for number, chunk in engine.chunks.items():
        chunk.register_forward_hook(lambda *_, number=number: events.append(number))
    for step in range(2):
        events.clear()
        with Gathers(events):
            engine.forward_backward(synthetic_batch(config, step, groups.at.dp, groups.topology.dp), NextToken())
        engine.optimizer_step(1e-4)
    return events


def test_the_next_chunk_is_gathered_beside_the_forwards_of_this_one():
    """Two chunks a rank and three micro-batches. The first chunk's own weights come first: embedding and layer on the first rank, one
    layer on the last, whose second chunk has a layer and the output."""
    config = config_of({**PLAIN, "dp": 2, "pp": 2, "v": 2, "n": 3})
    first, *_, last = run_ranks(4, _order_of_a_step, config)
    assert first == ["gather", "gather", 0, "gather", 0, 0, 2, 2, 2]
    assert last == ["gather", 1, "gather", "gather", 1, 1, 3, 3, 3]
