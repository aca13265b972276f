"""Ranks and groups by arithmetic, against megatron-core's own, up to 16,384 ranks under torch's fake backend."""

import itertools
import warnings

import pytest
import torch.distributed as dist

from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.topology import Coordinates, Topology
from megatron_llama3.planning.local_ranks import FORK, run_ranks

SIZES = [(2, 2, 2, 2), (4, 1, 3, 2), (1, 3, 2, 4), (3, 2, 1, 5), (8, 1, 1, 1)]


@pytest.mark.parametrize("sizes", SIZES)
def test_rank_and_coordinates_are_inverse(sizes):
    topology = Topology(*sizes)
    for rank in range(topology.world_size):
        assert topology.rank(topology.coordinates(rank)) == rank
    every = [Coordinates(*c) for c in itertools.product(*map(range, sizes))]
    assert sorted(map(topology.rank, every)) == list(range(topology.world_size))


def test_one_process_is_the_default():
    assert Topology() == Topology(1, 1, 1, 1)
    assert Topology().world_size == 1


def test_tp_is_innermost_and_dp_outermost():
    """The paper's figure 5: with all sizes 2, ranks 0 and 1 share TP, 0 and 2 CP, 0 and 4 PP, 0 and 8 DP."""
    topology = Topology(2, 2, 2, 2)
    assert [topology.group_ranks(0, axis) for axis in ("tp", "cp", "pp", "dp")] == [[0, 1], [0, 2], [0, 4], [0, 8]]


@pytest.mark.parametrize("sizes", SIZES)
def test_groups_are_megatron_cores(sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.parallel_state import RankGenerator

    tp, cp, pp, dp = sizes
    topology = Topology(*sizes)
    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-pp-dp")
    for token, axes in (("tp", ["tp"]), ("cp", ["cp"]), ("pp", ["pp"]), ("dp", ["dp"]), ("dp-cp", ["dp", "cp"]), ("tp-pp", ["tp", "pp"])):
        theirs = sorted(map(tuple, generator.get_ranks(token)))
        ours = sorted({tuple(topology.group_ranks(rank, *axes)) for rank in range(topology.world_size)})
        assert ours == theirs, token


def _groups_of_this_rank(config: ParallelConfig) -> tuple:
    groups = initialize_groups(config)
    mesh = groups.mesh()
    members = {n: dist.get_process_group_ranks(getattr(groups, n)) for n in ("tp", "cp", "pp", "dp", "dp_cp")}
    same = mesh.get_group("tp") is groups.tp and mesh.get_group("dp_cp") is groups.dp_cp
    return groups.topology, groups.rank, members, same, groups.is_last_stage, groups.embedding is None


def test_joined_groups_are_those_of_the_arithmetic_and_the_mesh_holds_the_same_objects():
    config = ParallelConfig(
        tensor_model_parallel_size=2, context_parallel_size=1, pipeline_model_parallel_size=3, world_size=6, sequence_parallel=True
    )
    for rank, (topology, own_rank, members, same, last, no_embedding) in enumerate(run_ranks(6, _groups_of_this_rank, config)):
        check_members(topology, own_rank, members)
        assert own_rank == rank
        assert same
        stage = topology.coordinates(rank).pp
        assert (last, no_embedding) == (stage == 2, stage == 1)


def check_members(topology: Topology, rank: int, members: dict[str, list[int]]) -> None:
    for name, axes in (("tp", ["tp"]), ("cp", ["cp"]), ("pp", ["pp"]), ("dp", ["dp"]), ("dp_cp", ["dp", "cp"])):
        assert members[name] == topology.group_ranks(rank, *axes), name


def _fake_rank(rank: int, world_size: int, config: ParallelConfig, pipe) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    pipe.send(_groups_of_this_rank(config))


@pytest.mark.slow
def test_any_rank_of_16384_under_the_fake_backend():
    """Table 4's long-context layout: TP 8, CP 16, PP 16, DP 8."""
    config = ParallelConfig(tensor_model_parallel_size=8, context_parallel_size=16, pipeline_model_parallel_size=16, world_size=16384)
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_fake_rank, args=(9999, 16384, config, send))
    process.start()
    try:
        assert receive.poll(120), "no answer"
        topology, rank, members, same, *_ = receive.recv()
    finally:
        process.join(10)
    assert (topology.dp, rank, same) == (8, 9999, True)
    check_members(topology, rank, members)
