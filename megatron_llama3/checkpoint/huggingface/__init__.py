"""Hugging Face folders."""

from megatron_llama3.checkpoint.huggingface.weights import export_hf, open_hf, write_hf

__all__ = ["export_hf", "open_hf", "write_hf"]
