"""Chooses the engine that `--engine` names."""

from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import ParallelGroups
from megatron_llama3.training.engine import Engine, Trainable


def build_engine(config: RunConfig, groups: ParallelGroups, trainable: Trainable = lambda name: True) -> Engine:
    """DeepSpeed is imported only when asked for: it takes seconds and compiles kernels."""
    if config.parallel.engine == "deepspeed":
        from megatron_llama3.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, groups, trainable)
    from megatron_llama3.training.fsdp2_engine import Fsdp2Engine

    return Fsdp2Engine(config, groups, trainable)
