"""When the FSDP2 engine gathers weights, what a skipped step and a loaded state leave, and the dtypes of bf16 training."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import ParallelGroups, initialize_groups
from megatron_llama3.parallel.tensor_parallel import local_part
from megatron_llama3.planning.equivalence import synthetic_batch
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.engine import Engine
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


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {key: local_part(tensor).detach().clone() for key, tensor in engine.state_tensors().items()}


def skip_and_step(config: RunConfig, groups: ParallelGroups, trainable=lambda name: True) -> Engine:
    """A skipped step leaves weights, moments and no gradient; the next one is the first. Then a step that counts."""
    engine = build_engine(config, groups, trainable)
    whole, before = lambda step: synthetic_batch(config, step, groups.at.dp, groups.topology.dp), state_of(engine)
    engine.forward_backward(whole(0), NextToken())
    engine.clip_gradients(config.optimizer.clip_grad)
    engine.skip_step()
    after = state_of(engine)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    norms = []
    for _ in range(2):  # of a gradient that was not dropped, the second would be another
        engine.forward_backward(whole(2), NextToken())
        norms.append(engine.clip_gradients(0.0))
        engine.skip_step()
    assert norms[0] == norms[1] > 0
    engine.forward_backward(whole(2), NextToken())
    assert engine.clip_gradients(config.optimizer.clip_grad) == norms[0]
    engine.optimizer_step(1e-3)
    after = state_of(engine)
    trained = [key for key in before if trainable(key.removeprefix("model.") if key.startswith("model.") else key.split(".", 2)[2])]
    assert sorted(key for key in before if not torch.equal(before[key], after[key])) == sorted(trained)
    assert set(engine.state_tensors(with_optimizer=False)) == {key for key in before if key.startswith("model.")}
    return engine


def _all_of_it(config: RunConfig) -> None:
    groups = initialize_groups(config.parallel)
    engine = skip_and_step(config, groups)
    assert all(parameter.grad is None for _, parameter in engine.named_weights())
    assert {group["lr"] for group in engine.optimizer.param_groups} == {1e-3}
    steps = lambda: {state["step"].item() for state in engine.optimizer.state.values()}  # noqa: E731
    assert steps() == {1.0}
    engine.state_loaded(7)
    assert steps() == {7.0}
    engine.state_loaded(9, with_optimizer=False)
    assert steps() == {7.0}
    frozen = build_engine(config, groups, lambda name: False)
    assert frozen.optimizer is None
    frozen.optimizer_step(1e-3)
    frozen.state_loaded(7)
    assert frozen.owned_gradients() == {}
    assert set(frozen.state_tensors()) == {f"model.{name}" for name, _ in frozen.named_weights()}


@pytest.mark.parametrize("dp", [1, 2])
def test_skipped_steps_and_loaded_states(dp):
    run_ranks(dp, _all_of_it, config_of({**PLAIN, "dp": dp, "tied": True}))


def _gradients_in_bf16(config: RunConfig) -> dict[str, Tensor]:
    groups = initialize_groups(config.parallel)
    engine = build_engine(config, groups)
    engine.forward_backward(synthetic_batch(config, 0, groups.at.dp, groups.topology.dp), NextToken())
    found = {name: engine.gradient_of(name) for name, _ in engine.named_weights()}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).detach().clone() for name, g in found.items()}


def test_bf16_gradients_are_added_up_and_reduced_in_float32():
    (exact,) = run_ranks(1, _gradients_in_bf16, config_of(PLAIN, "fp32"))
    for layout in ({"dp": 2}, {}):
        for found in run_ranks(layout.get("dp", 1), _gradients_in_bf16, config_of(PLAIN | layout, "bf16")):
            for name, gradient in found.items():
                assert gradient.dtype == torch.float32
                assert (gradient != gradient.bfloat16()).float().mean() > 0.2, f"{name}: rounded to bf16"
                assert (gradient - exact[name]).norm() <= 0.1 * exact[name].norm(), name


def _weights_after_a_step_in_bf16(config: RunConfig) -> dict[str, Tensor]:
    groups = initialize_groups(config.parallel)
    engine = build_engine(config, groups)
    engine.forward_backward(synthetic_batch(config, 0, groups.at.dp, groups.topology.dp), NextToken())
    engine.optimizer_step(1e-4)
    return {name: local_part(p).detach().clone() for name, p in engine.named_weights()}


def test_bf16_training_keeps_its_weights_in_float32():
    """An update of 1e-4 is lost in bf16 where a weight is 0.1 or more, as each norm's is."""
    for layout in ({"dp": 2}, {}):
        for found in run_ranks(layout.get("dp", 1), _weights_after_a_step_in_bf16, config_of(PLAIN | layout, "bf16")):
            for name, weight in found.items():
                assert weight.dtype == torch.float32
                assert (weight != weight.bfloat16()).float().mean() > 0.9, f"{name}: rounded to bf16"
