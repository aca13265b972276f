"""Containers and files that the formats are made of: safetensors, torch.save's zip, JSON; folders that are whole or absent."""
