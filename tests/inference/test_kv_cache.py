"""The cache returns what was appended, in order, and refuses what does not fit."""

import pytest
import torch

from megatron_llama3.inference.kv_cache import KVCache


def test_append_returns_all_so_far():
    keys, values = torch.randn(7, 2, 3, 4), torch.randn(7, 2, 3, 4)
    cache = KVCache(8, 2, 3, 4, torch.float32, torch.device("cpu"))
    for start, end in ((0, 4), (4, 5), (5, 7)):
        k, v = cache.append(keys[start:end], values[start:end])
        assert torch.equal(k, keys[:end])
        assert torch.equal(v, values[:end])
    assert cache.length == 7


def test_a_full_cache_refuses():
    cache = KVCache(3, 1, 1, 2, torch.float32, torch.device("cpu"))
    cache.append(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2))
    with pytest.raises(ValueError, match="holds 3 tokens, 4 do not fit"):
        cache.append(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2))
