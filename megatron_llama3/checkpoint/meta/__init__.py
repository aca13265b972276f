"""Meta's folders."""

from megatron_llama3.checkpoint.meta.weights import open_meta, write_meta

__all__ = ["open_meta", "write_meta"]
