"""Runs one rank of any world in this process, on fake tensors: the project's own engine, executor, gradient clipping and optimizer step,
with torch's fake backend in the place of the other ranks. What it measures is held against memory.py's arithmetic.

A process runs one rank once: process groups are global. Limits: eager blocks (a compiled one would be compiled), engine fsdp.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import Phase
from megatron_llama3.data.loader import Batch
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.pipeline_parallel import PipelineExecutor
from megatron_llama3.parallel.topology import Coordinates, Topology
from megatron_llama3.planning.live_memory import LiveMemory
from megatron_llama3.planning.memory import microbatches_of
from megatron_llama3.planning.stand_ins import replaced, stand_ins
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.objectives import NextToken

STEPS = 2  # in the first, DTensor makes tensors of global size to learn how its operators shard


@dataclass(frozen=True)
class ActionMemory:
    """Live bytes before, during (at most) and after one action of the pipeline."""

    name: str
    before: int
    peak: int
    after: int


@dataclass(frozen=True)
class MeasuredStep:
    """Bytes of the last step of a dry run."""

    peak: int
    moment: str
    optimizer_peak: int
    """while gradients are clipped and weights updated"""
    after: int
    actions: list[ActionMemory]


class FakeMemory(LiveMemory):
    """Live bytes of fake tensors. Where the program asks for a number it is told 1: a token count, a loss, a norm."""

    def answer(self, func, args, kwargs):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten._assert_async.msg:
            return None
        return func(*args, **kwargs)


def rank_of_stage(config: RunConfig, stage: int) -> int:
    """The first rank of a pipeline stage on every other axis; under CP no rank keeps more than the first."""
    p = config.parallel
    topology = Topology(
        tp=p.tensor_model_parallel_size, cp=p.context_parallel_size, pp=p.pipeline_model_parallel_size, dp=p.data_parallel_size
    )
    return topology.rank(Coordinates(tp=0, cp=0, pp=stage, dp=0))


def measure_rank(config: RunConfig, phase: Phase, rank: int) -> MeasuredStep:
    """The second step of `rank` in a world of `config.parallel.world_size`, with the phase's batch, each sequence one document."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.parallel.world_size)
    groups = initialize_groups(config.parallel)
    batch = _one_document_each(microbatches_of(config, phase), config.training.micro_batch_size, phase.seq_length)
    fake, memory = FakeTensorMode(allow_non_fake_inputs=True), FakeMemory()
    actions: list[ActionMemory] = []
    with stand_ins(fake), replaced(PipelineExecutor, "_COMMANDS", _measured(PipelineExecutor._COMMANDS, memory, actions)), fake, memory:
        engine = build_engine(config, groups)
        for _ in range(STEPS):
            actions.clear()
            engine.forward_backward(batch, NextToken())
            memory.peak = memory.live
            engine.clip_gradients(config.optimizer.clip_grad)
            engine.optimizer_step(config.optimizer.lr)
        fullest = max(actions, key=lambda action: action.peak)
        return MeasuredStep(fullest.peak, fullest.name, memory.peak, memory.live, actions)


def _measured(commands: dict[str, Callable], memory: LiveMemory, actions: list[ActionMemory]) -> dict[str, Callable]:
    """The executor's commands, each leaving its entry in `actions`."""

    def measured(command: Callable) -> Callable:
        def run(executor, action):
            before = memory.peak = memory.live
            command(executor, action)
            actions.append(ActionMemory(str(action), before, memory.peak, memory.live))

        return run

    return {kind: measured(command) for kind, command in commands.items()}


def _one_document_each(microbatches: int, micro_batch_size: int, seq_length: int) -> Batch:
    shape = (microbatches, micro_batch_size, seq_length)
    tokens, everywhere = np.zeros(shape, np.int64), np.ones(shape, bool)
    positions = np.broadcast_to(np.arange(seq_length), shape)
    return Batch(tokens=tokens, targets=tokens, loss_mask=everywhere, document_ids=np.zeros(shape, np.int32), position_ids=positions)
