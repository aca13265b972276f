"""Megatron-LM's distributed checkpoints (--ckpt-format torch_dist)."""

from megatron_llama3.checkpoint.megatron.reader import open_megatron
from megatron_llama3.checkpoint.megatron.writer import write_megatron

__all__ = ["open_megatron", "write_megatron"]
