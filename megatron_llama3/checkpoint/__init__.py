"""Weights on disk: the native sharded format, and Hugging Face's, Meta's and GGUF's read and written tensor by tensor."""
