"""GGUF files, as input."""

from megatron_llama3.checkpoint.gguf.weights import gguf_file, open_gguf

__all__ = ["gguf_file", "open_gguf"]
