"""How a rank joins a job and what its groups are asked for, by fakes; that the groups are right is in test_topology.py."""

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.parallel import groups
from megatron_llama3.parallel.groups import initialize_groups, said_by_rank_0
from megatron_llama3.planning.local_ranks import run_ranks


@pytest.fixture
def asked(monkeypatch):
    """What torch and megatron-core are asked for by rank 5 of 8, as (what, arguments)."""
    calls = []

    def note(name: str, answer=None):
        return lambda *args, **how: calls.append((name, args, how)) or answer

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", note("join"))
    monkeypatch.setattr(dist, "new_group", note("new", "new"))
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist, "HashStore", lambda: "own store")
    state = SimpleNamespace(initialize_model_parallel=note("make"))
    for name in ("tensor_model_parallel", "context_parallel", "pipeline_model_parallel", "embedding"):
        setattr(state, f"get_{name}_group", lambda name=name: name)
    state.get_data_parallel_group = lambda with_context_parallel: f"data {with_context_parallel}"
    monkeypatch.setattr(groups, "megatron_parallel_state", lambda: state)
    monkeypatch.setattr(groups, "_introduce_stages", lambda pipelines: None)
    monkeypatch.delenv("RANK", raising=False)
    return calls


MINUTES = {"timeout": timedelta(minutes=7)}


@pytest.mark.parametrize("is_launched", [True, False])
@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_a_job_is_joined_with_its_timeout_and_a_backend_for_cpus(asked, monkeypatch, is_launched, device, backend):
    monkeypatch.setattr(groups, "_this_device", lambda: torch.device(device))
    if is_launched:
        monkeypatch.setenv("RANK", "5")
    found = initialize_groups(ParallelConfig(world_size=8), 7)
    alone = {} if is_launched else {"store": "own store", "rank": 0, "world_size": 1}
    assert asked[0] == ("join", (backend,), MINUTES | alone)
    assert (found.device.type, found.rank, found.topology.dp) == (device, 5, 8)


def test_a_job_that_exists_is_left_as_it_is(asked, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    initialize_groups(ParallelConfig(world_size=8))
    assert [name for name, *_ in asked] == ["make", "new", "new"]


@pytest.mark.parametrize("backend, of_cpus", [("gloo", "gloo"), ("nccl", "gloo"), ("fake", "fake")])
def test_groups_have_the_jobs_timeout_and_those_for_the_host_a_backend_of_cpus(asked, monkeypatch, backend, of_cpus):
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    config = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2, pipeline_model_parallel_size=2, world_size=8)
    found = initialize_groups(config, 7)
    made = next(how for name, _, how in asked if name == "make")
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2}
    assert made == sizes | {
        "expert_tensor_parallel_size": 4,
        "order": "tp-cp-ep-pp-dp",
        "create_gloo_process_groups": False,
        "distributed_timeout_minutes": 7,
    }
    new = [(args, how) for name, args, how in asked if name == "new"]
    assert new == [*((([r, r + 4],), MINUTES) for r in range(4)), *2 * [((), {"backend": of_cpus} | MINUTES)]]
    names = ("tp", "cp", "pp", "dp", "dp_cp", "embedding")
    theirs = ["tensor_model_parallel", "context_parallel", "pipeline_model_parallel", "data False", "data True", "embedding"]
    assert [getattr(found, name) for name in names] == theirs


@pytest.mark.parametrize("rank, pp, has_embedding", [(0, 4, True), (2, 4, False), (4, 4, True), (5, 4, False), (7, 4, True), (5, 1, True)])
def test_the_embedding_group_is_of_both_ends_and_one_stage_needs_no_second_pipeline(asked, monkeypatch, rank, pp, has_embedding):
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    found = initialize_groups(ParallelConfig(pipeline_model_parallel_size=pp, world_size=8), 7)
    assert (found.embedding == "embedding") == has_embedding
    assert (found.pp_gradients == found.pp) == (pp == 1)


@pytest.mark.parametrize("backend, has_gpus, local_rank, expected", [
    ("gloo", True, "3", "cpu"), ("nccl", False, "3", "cpu"), ("nccl", True, "3", "cuda:3"), ("nccl", True, None, "cuda:0"),
    (None, True, "1", "cuda:1"), (None, False, "1", "cpu"),
])  # fmt: skip
def test_the_device_of_a_rank(monkeypatch, backend, has_gpus, local_rank, expected):
    taken = []
    monkeypatch.setattr(dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert groups._this_device() == torch.device(expected)
    assert taken == ([torch.device(expected)] if "cuda" in expected else [])


def _answers() -> list:
    joined = initialize_groups(ParallelConfig(world_size=2))
    asked, said = [], []

    def answer():
        asked.append(1)
        if len(asked) == 3:
            raise UserError("not today")
        return {"asked": len(asked)}

    for is_shared in (True, False, True):
        try:
            said.append(said_by_rank_0(joined, answer, is_shared))
        except UserError as error:
            said.append(str(error))
    groups.destroy_groups()
    return [*said, len(asked), dist.is_initialized()]


def test_what_rank_0_says():
    first, second = run_ranks(2, _answers)
    assert first == [{"asked": 1}, {"asked": 2}, "not today", 3, False]
    assert second == [{"asked": 1}, None, "not today", 0, False]


def _sockets_after_talking() -> int:
    groups = initialize_groups(ParallelConfig(world_size=dist.get_world_size(), tensor_model_parallel_size=2))
    dist.barrier(groups.control)
    for group in (groups.control, groups.saving):
        dist.all_reduce(torch.ones(1), group=group)
        dist.all_gather_object([None] * groups.topology.world_size, "host", group=group)
        dist.broadcast_object_list(["answer"], src=0, group=group)
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))


@pytest.mark.slow
def test_a_rank_of_a_larger_job_has_hardly_more_sockets():
    few, many = (max(run_ranks(ranks, _sockets_after_talking)) for ranks in (4, 16))
    assert many <= few + 12, "a mesh of each group would be 12 more for each of the three groups that hold all ranks, and 33 for the others"


def _receive_before_anyone_sends() -> list[float]:
    groups = initialize_groups(ParallelConfig(world_size=3, pipeline_model_parallel_size=3))
    found = []
    for group in (groups.pp, groups.pp_gradients):
        got = torch.zeros(1)
        work = dist.irecv(got, group=group, group_src=(groups.rank - 1) % 3)
        dist.isend(torch.tensor([1.0 + groups.rank]), group=group, group_dst=(groups.rank + 1) % 3).wait()
        work.wait()
        found += got.tolist()
    return found


def test_stages_may_receive_before_anyone_sends():
    assert run_ranks(3, _receive_before_anyone_sends, timeout=60) == [[3.0, 3.0], [1.0, 1.0], [2.0, 2.0]]
