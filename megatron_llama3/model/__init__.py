"""Llama 3 as the paper tells it (section 3.2)."""
