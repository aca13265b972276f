"""GGUF files, as input."""
