"""The project's own format: torch.distributed.checkpoint's files in Megatron's folders, with a manifest."""
