"""Tokens on disk to batches: Megatron's indexed format, shuffling and packing, blending, the training stream."""
