"""The DeepSpeed engine against one process of the FSDP2 engine, and its state out and in, over stages and engines."""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

pytest.importorskip("megatron_llama3.training.deepspeed_engine")  # before ranks fork: its import takes seconds

from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.tensor_parallel import local_part
from megatron_llama3.planning.equivalence import Trace, compare, one_process, train_under
from megatron_llama3.planning.local_ranks import RankFailedError, run_ranks
from megatron_llama3.planning.synthetic_batch import synthetic_batch
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.objectives import NextToken
from tests.training.layouts import AXES, Row, config_of
from tests.training.test_fsdp2_engine import skip_and_step

PLAIN: Row = {axis: values[0] for axis, values in AXES.items()} | {"kv_heads": 3}
TP_PP: Row = {"engine": "deepspeed-zero-1", "tp": 2, "sp": True, "pp": 2, "v": 2, "tied": True, "kv_heads": 1}
DP_CP: Row = {"engine": "deepspeed-zero-1", "dp": 2, "cp": 2}
ZERO_2: Row = {"engine": "deepspeed-zero-2", "tp": 2, "sp": True, "dp": 2, "kv_heads": 1}
ZERO_3: Row = ZERO_2 | {"engine": "deepspeed-zero-3", "tied": True}
# Three ranks sum in an order that depends on where a weight lies in a buffer: copies of a weight would drift apart.
COPIES: Row = {"engine": "deepspeed-zero-1", "dp": 3, "pp": 2, "tied": True, "schedule": "zero-bubble", "frozen": True}
OFFLOAD: Row = {"engine": "deepspeed-zero-1-offload", "dp": 2, "cp": 2}
LAYOUTS = {"TP x PP": TP_PP, "DP x CP": DP_CP, "ZeRO-2": ZERO_2, "ZeRO-3": ZERO_3, "copies": COPIES}
SAMPLE = ("TP x PP", "ZeRO-3")
STEPS = 20


def config(row: Row, dtype: str = "fp32") -> RunConfig:
    return config_of(PLAIN | row, dtype)


def half(name: str) -> bool:
    """Frozen: all of the first stage but the tied embedding, and a part of every layer."""
    return not name.startswith("layers.0.") and not name.endswith(("wq.weight", "w1.weight", "ffn_norm.weight"))


def everything(name: str) -> bool:
    return True


def trained(row: Row):
    return half if row.get("frozen") else everything


@cache
def reference(layout: str, dtype: str, steps: int) -> Trace:
    row = LAYOUTS[layout]
    return train_under(one_process(config(row, dtype)), steps, trained(row))


@pytest.fixture(scope="module")
def cpu_adam():
    """DeepSpeed's C++ Adam, built and loaded before ranks fork: g++ takes minutes."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()


@pytest.mark.parametrize("layout", [pytest.param(n, marks=pytest.mark.slow if n in SAMPLE else pytest.mark.full) for n in LAYOUTS])
def test_equals_one_process_in_fp32(layout):
    row = LAYOUTS[layout]
    found = compare(train_under(config(row), STEPS, trained(row)), reference(layout, "fp32", STEPS))
    assert found.loss <= 1e-6, found
    assert found.gradient <= 1e-5, found
    assert found.norm <= 1e-5, found
    assert found.copies == 0, found


def last_stage(name: str) -> bool:
    return name.startswith(("layers.1.", "norm", "output"))


@pytest.mark.parametrize("row, trainable", [
    (TP_PP | {"v": 1}, everything), (ZERO_2 | {"sp": False}, half), (ZERO_3, everything),
    ({"engine": "deepspeed-zero-1", "pp": 2}, last_stage),
], ids=["TP x PP", "ZeRO-2, half frozen", "ZeRO-3", "a frozen stage"])  # fmt: skip
def test_two_steps_equal_one_process(row, trainable):
    found = compare(train_under(config(row), 2, trainable), train_under(one_process(config(row)), 2, trainable))
    assert max(found.loss, found.norm, found.later_norms) <= 1e-6, found
    assert max(found.gradient, found.weight) <= 1e-5, found
    assert found.copies == 0, found


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_in_bf16_is_at_most_twice_that_of_one_process(layout):
    row = LAYOUTS[layout]
    fp32 = reference(layout, "fp32", STEPS)
    alone = compare(reference(layout, "bf16", STEPS), fp32)
    found = compare(train_under(config(row, "bf16"), STEPS, trained(row)), fp32)
    assert found.loss_rms <= 2 * alone.loss_rms
    assert found.all_gradients <= 2 * alone.all_gradients
    assert found.gradient <= 2 * alone.gradient
    assert found.copies == 0


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.usefixtures("cpu_adam")
def test_offload_changes_nothing(stage, dtype):
    row = ZERO_2 | {"engine": f"deepspeed-zero-{stage}"}
    kept = train_under(config(row, dtype), 5)
    offloaded = train_under(config(row | {"engine": f"deepspeed-zero-{stage}-offload"}, dtype), 5)
    found = compare(offloaded, kept)
    bound = 1e-6 if dtype == "fp32" else 1e-3
    assert found.loss <= bound, found
    assert found.gradient == 0, found


# --- state out and in ---


def evaluate(engine: Engine) -> float:
    batch = synthetic_batch(engine.config, 9, engine.groups.at.dp, engine.groups.topology.dp)
    return engine.evaluate(batch, NextToken())[0]["loss"]


def take_step(engine: Engine, step: int) -> tuple[float, float]:
    batch = synthetic_batch(engine.config, step, engine.groups.at.dp, engine.groups.topology.dp)
    loss = engine.forward_backward(batch, NextToken())["loss"]
    norm = engine.clip_gradients(engine.config.optimizer.clip_grad)
    engine.optimizer_step(1e-3)
    return loss, norm


def whole_state(engine: Engine) -> dict[str, Tensor]:
    state = engine.state_tensors()
    return {key: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for key, t in state.items()}


def load(engine: Engine, whole: dict[str, Tensor], step: int) -> None:
    state = engine.state_tensors()
    assert state.keys() == whole.keys()
    for key, tensor in state.items():
        with torch.no_grad():
            name = key.split(".", 1 if key.startswith("model.") else 2)[-1]
            own = local_part(tensor)
            own.copy_(part_of(engine, name, whole[key], own.shape))
    engine.state_loaded(step)


def part_of(engine: Engine, name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """This TP rank's shard, and of that this data-parallel rank's rows where the engine cuts them."""
    spec, dim = engine.weight(name), engine.weight(name).split_dim_at(engine.tp.size)
    if dim is not None:
        start, end = spec.local_range(engine.tp.size, engine.tp.rank)
        value = value.narrow(dim, start, end - start)
    if value.shape == shape:
        return value
    rows, rank = value.chunk(engine.groups.dp_cp.size()), engine.groups.at.dp
    return rows[rank] if rank < len(rows) else value[:0]


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def moved_over(source: RunConfig, targets: list[RunConfig], trainable) -> dict:
    """Trains two steps in one engine, hands its state to each other engine and back, and trains both on from there."""
    groups = initialize_groups(source.parallel)
    engine = build_engine(source, groups, trainable)
    initial = whole_state(engine)
    for step in range(2):
        take_step(engine, step)
    whole = whole_state(engine)
    for key in whole:
        assert not key.startswith("optimizer") or whole[key].any(), f"{key} is empty: this tests nothing"
    found = {"unchanged": [key for key in initial if trainable(key.removeprefix("model.")) and torch.equal(initial[key], whole[key])]}
    evaluated = evaluate(engine)
    engines = []
    for target in targets:
        target.training.seed += 1  # other weights at first, which the loaded ones must replace
        other = build_engine(target, groups, trainable)
        load(other, whole, step=2)
        target.training.seed -= 1
        name = f"{target.parallel.engine}-{target.parallel.zero_stage}"
        found[name, "state"] = differing(whole_state(other), whole)
        found[name, "loss"] = evaluate(other) / evaluated - 1
        engines.append((name, other))
    expected = [take_step(engine, step) for step in (2, 3)]
    after = whole_state(engine)
    for name, other in engines:
        found[name, "steps"] = [take_step(other, step) for step in (2, 3)], expected
        found[name, "weights"] = max(((whole_state(other)[k] - after[k]).norm() / after[k].norm()).item() for k in after if "model" in k)
        load(other, whole, step=2)
        found[name, "again"] = [take_step(other, step) for step in (2, 3)]
    return found


def check_moved_over(found: dict, names: list[str], dtype: str) -> None:
    """Other engines round otherwise; the state is the same to the last bit, and a step taken twice from it as well."""
    bound = 1e-5 if dtype == "fp32" else 2e-2
    assert not found["unchanged"]
    for name in names:
        assert not found[name, "state"], name
        assert abs(found[name, "loss"]) <= bound, name
        theirs, expected = found[name, "steps"]
        assert theirs == [pytest.approx(pair, rel=bound) for pair in expected], name
        assert found[name, "weights"] <= bound, name
        assert found[name, "again"] == theirs, name


ENGINES = ("fsdp", "deepspeed-zero-1", "deepspeed-zero-2", "deepspeed-zero-3")


@pytest.mark.full
@pytest.mark.parametrize(("source", "dtype"), [("deepspeed-zero-1", "bf16"), ("deepspeed-zero-3", "fp32"), ("fsdp", "bf16")])
def test_state_moves_between_stages_and_engines(source, dtype):
    # 3 DP ranks divide hardly any weight: ranges are uneven, and ZeRO-3 pads them.
    row = {"tp": 2, "sp": True, "dp": 3, "kv_heads": 1, "tied": True}
    targets = [config(row | {"engine": engine}, dtype) for engine in ENGINES]
    results = run_ranks(6, moved_over, config(row | {"engine": source}, dtype), targets, everything)
    names = [f"{c.parallel.engine}-{c.parallel.zero_stage}" for c in targets]
    for found in results:
        check_moved_over(found, names, dtype)


@pytest.mark.slow
def test_state_of_half_frozen_weights_under_a_pipeline():
    row = {"tp": 2, "pp": 2, "tied": True, "schedule": "zero-bubble", "kv_heads": 1}
    targets = [config(row | {"engine": engine}) for engine in ENGINES[:2]]
    for found in run_ranks(4, moved_over, targets[1], targets, half):
        check_moved_over(found, ["fsdp-1", "deepspeed-1"], "fp32")


def test_loaded_state_goes_on_as_in_the_engine_that_saved_it():
    row = {"dp": 2, "tied": True}
    targets = [config(row | {"engine": engine}) for engine in (ENGINES[1], ENGINES[3])]
    for found in run_ranks(2, moved_over, config(row), targets, half):
        check_moved_over(found, ["deepspeed-1", "deepspeed-3"], "fp32")


@pytest.mark.parametrize("offload", [False, True])
def test_adam_gets_the_runs_numbers(monkeypatch, offload):
    from megatron_llama3.training import deepspeed_engine

    optimizers = []
    monkeypatch.setattr(deepspeed_engine.deepspeed.ops.adam, "DeepSpeedCPUAdam", lambda *groups, **how: optimizers.append((groups, how)))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *groups, **how: optimizers.append((groups, how)))
    source = config({"engine": "deepspeed-zero-1"})
    o, source.parallel.optimizer_cpu_offload = source.optimizer, offload
    o.lr, o.adam_beta1, o.adam_beta2, o.adam_eps = 0.5, 0.6, 0.7, 0.8
    engine = object.__new__(deepspeed_engine.DeepSpeedEngine)
    engine.config, engine.trained, engine._decay_groups = source, {"a": 1}, lambda weights: [weights]
    for ballast, groups in ((None, [{"a": 1}]), ("one number", [{"params": ["one number"], "weight_decay": 0.0}])):
        engine.ballast = ballast
        engine._make_adam()
        assert optimizers.pop() == ((groups,), {"lr": 0.5, "betas": (0.6, 0.7), "eps": 0.8} | ({} if offload else {"fused": True}))


def _skip_and_step(configs: list[RunConfig]) -> None:
    groups = initialize_groups(configs[0].parallel)
    for source in configs:
        engine = skip_and_step(source, groups, half)
        assert {group["lr"] for group in engine.deepspeed.optimizer.param_groups} == {1e-3}


def test_a_skipped_step_leaves_no_trace():
    run_ranks(2, _skip_and_step, [config({"engine": engine, "dp": 2, "tied": True}) for engine in ENGINES[1:]])


def initial_state(source: RunConfig) -> dict[str, Tensor]:
    return whole_state(build_engine(source, initialize_groups(source.parallel)))


def test_master_weights_start_unrounded():
    """DeepSpeed alone makes them from weights already rounded to bf16."""
    fsdp, deepspeed = (run_ranks(1, initial_state, config({"engine": engine}, "bf16"))[0] for engine in ENGINES[:2])
    assert not differing(fsdp, deepspeed)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in deepspeed.values())


def frozen(name: str) -> bool:
    return False


def test_nothing_to_train_is_refused():
    with pytest.raises(RankFailedError, match="UserError: --engine deepspeed: all weights are frozen"):
        run_ranks(1, _build, config({"engine": "deepspeed-zero-2"}), frozen)


def _build(source: RunConfig, trainable) -> None:
    build_engine(source, initialize_groups(source.parallel), trainable)
