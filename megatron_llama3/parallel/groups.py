"""megatron-core's process groups over NCCL, gloo or torch's fake backend, held in one object that is passed to whoever communicates."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.config.storage import user_error
from megatron_llama3.parallel.topology import Coordinates, Topology


@dataclass(frozen=True)
class ParallelGroups:
    """Every group this rank belongs to. `dp_cp` is what gradients are reduced over, `embedding` pairs first and last pipeline stage."""

    topology: Topology
    rank: int
    device: torch.device
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    pp_gradients: dist.ProcessGroup
    """The same ranks as `pp` again: a stage's gradients travel beside its activations and neither waits for the other."""
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    embedding: dist.ProcessGroup | None
    control: dist.ProcessGroup
    """All ranks on a CPU backend, for what the ranks agree on between steps."""
    saving: dist.ProcessGroup
    """The same again for asynchronous saves alone: their collectives come from a thread of their own, at any time."""

    @property
    def at(self) -> Coordinates:
        return self.topology.coordinates(self.rank)

    @property
    def is_last_stage(self) -> bool:
        return self.at.pp == self.topology.pp - 1

    def mesh(self) -> DeviceMesh:
        """The (dp_cp, tp) mesh of this rank's pipeline stage; its groups are megatron-core's own."""
        # One row for each DP x CP rank, one column for each TP rank: ranks of TP are consecutive numbers.
        first_of_tp = [r - self.at.tp for r in self.topology.group_ranks(self.rank, "cp", "dp")]
        layout = [[first + t for t in range(self.topology.tp)] for first in first_of_tp]
        return DeviceMesh.from_group([self.dp_cp, self.tp], self.device.type, mesh=layout, mesh_dim_names=("dp_cp", "tp"))


def initialize_groups(config: ParallelConfig, timeout_minutes: float = 10.0) -> ParallelGroups:
    """Joins the job that torchrun or srun describes in the environment and makes every group.

    Without RANK in the environment this is a job of one process. The default group is left as it is if one exists already (tests, the
    fake backend).
    """
    device = _this_device()
    # Ranks of gloo connect when they first talk; else each group, of which three hold all ranks, makes a full mesh at once.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        # gloo beside NCCL: object collectives and asynchronous saves need a CPU backend in a GPU job too.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return _make_groups(config, device, timeout_minutes)


def said_by_rank_0(groups: ParallelGroups, answer: Callable, is_shared: bool = True):
    """What `answer()` gives on rank 0, on every rank; without `is_shared` on rank 0 alone, and None elsewhere. Collective. Where it raises
    UserError or OSError, all ranks raise UserError, or StorageError for what may pass."""
    found, own = [None, None], None
    if groups.rank == 0:
        try:
            own = answer()
            found[0] = own if is_shared else None
        except (OSError, UserError) as error:
            found[1] = user_error(error)
    dist.broadcast_object_list(found, src=0, group=groups.saving)
    if found[1] is not None:
        raise found[1]
    return found[0] if is_shared else own


def agreed(groups: ParallelGroups, attempt: Callable):
    """What `attempt()` gives on this rank, which it makes without the others. Collective: where it raises UserError or OSError on one rank,
    all ranks raise what the first of them says, as UserError, or as StorageError for what may pass."""
    own, failure = None, None
    try:
        own = attempt()
    except (OSError, UserError) as error:
        failure = user_error(error)
    first = torch.tensor(groups.rank if failure is not None else dist.get_world_size())
    dist.all_reduce(first, dist.ReduceOp.MIN, group=groups.saving)
    if first == dist.get_world_size():
        return own
    said = [failure]
    dist.broadcast_object_list(said, src=int(first), group=groups.saving)
    raise said[0]


def destroy_groups() -> None:
    megatron_parallel_state().destroy_model_parallel()
    dist.destroy_process_group()


def megatron_parallel_state():
    """megatron-core's module of groups, imported without its warnings about absent GPU libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    return parallel_state


def _this_device() -> torch.device:
    """The GPU of this rank; the CPU without one, or where the job was started on gloo alone (tests, tools/certify_layout.py)."""
    is_gloo = dist.is_initialized() and dist.get_backend() == "gloo"
    if is_gloo or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _pipelines_again(topology: Topology, rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """A second group of this rank's pipeline. Every rank of the job makes those of all pipelines, in the same order."""
    pipelines = sorted({tuple(topology.group_ranks(r, "pp")) for r in range(topology.world_size)})
    groups = {ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in pipelines}
    return groups[tuple(topology.group_ranks(rank, "pp"))]


def _introduce_stages(pipelines: tuple[dist.ProcessGroup, ...]) -> None:
    """Connects each stage with the next, and the last with the first. Ranks of gloo connect when both have called the other, and until then
    `irecv` does not return: stages that wait for each other's messages would wait for ever."""
    for group in pipelines:
        for stage in range(group.size()):  # link by link, in one order for all: no rank waits for one that waits for it
            low, high = sorted((stage, (stage + 1) % group.size()))
            if group.rank() == low:
                dist.send(torch.zeros(1), group=group, group_dst=high)
            elif group.rank() == high:
                dist.recv(torch.zeros(1), group=group, group_src=low)


def _make_groups(config: ParallelConfig, device: torch.device, timeout_minutes: float) -> ParallelGroups:
    parallel_state = megatron_parallel_state()
    tp, cp, pp = config.tensor_model_parallel_size, config.context_parallel_size, config.pipeline_model_parallel_size
    topology = Topology(tp=tp, cp=cp, pp=pp, dp=dist.get_world_size() // (tp * cp * pp))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_tensor_parallel_size=tp * cp,  # megatron-core asserts on this rank order without it
        order="tp-cp-ep-pp-dp",
        create_gloo_process_groups=False,  # `control` and `saving` below are all that runs on the CPU of a GPU job
        distributed_timeout_minutes=timeout_minutes,
    )
    rank = dist.get_rank()
    cpu_backend = "fake" if dist.get_backend() == "fake" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    again = _pipelines_again(topology, rank, timeout) if pp > 1 else pipeline
    if pp > 1 and dist.get_backend() == "gloo":
        _introduce_stages((pipeline, again))
    in_embedding_group = topology.coordinates(rank).pp in (0, pp - 1)
    return ParallelGroups(
        topology=topology,
        rank=rank,
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        pp=pipeline,
        pp_gradients=again,
        dp=parallel_state.get_data_parallel_group(with_context_parallel=False),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        embedding=parallel_state.get_embedding_group() if in_embedding_group else None,
        control=dist.new_group(backend=cpu_backend, timeout=timeout),
        saving=dist.new_group(backend=cpu_backend, timeout=timeout),
    )
