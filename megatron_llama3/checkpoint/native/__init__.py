"""The project's own format: torch.distributed.checkpoint's files in Megatron's folders, with a manifest."""

from megatron_llama3.checkpoint.native.weights import check_files, open_native, open_native_tensors, write_native

__all__ = ["check_files", "open_native", "open_native_tensors", "write_native"]
