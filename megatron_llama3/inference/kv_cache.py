"""The keys and values of one layer, kept between the calls that prefill a prompt and decode it token by token."""

import torch
from torch import Tensor


class KVCache:
    """Room for `max_length` tokens of one layer, allocated once. Attention appends to it (model/attention.py) and reads it whole."""

    def __init__(self, max_length: int, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.keys, self.values = (torch.zeros(max_length, batch, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values [n, b, KV heads, d], after rotation -> views of all so far, [length, b, KV heads, d].

        Raises ValueError where they do not fit: whoever made the cache knows how long it gets.
        """
        end = self.length + keys.shape[0]
        if end > self.keys.shape[0]:
            raise ValueError(f"the cache holds {self.keys.shape[0]} tokens, {end} do not fit")
        self.keys[self.length : end] = keys
        self.values[self.length : end] = values
        self.length = end
        return self.keys[:end], self.values[:end]
