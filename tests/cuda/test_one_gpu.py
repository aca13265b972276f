"""What only a GPU can show: attention kernels that train there alone, and a bf16 step of the engine on NCCL, compiled and not."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import Batch
from megatron_llama3.model.attention import KERNELS, AttentionMask
from megatron_llama3.parallel.groups import destroy_groups, initialize_groups
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.objectives import NextToken

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")
LENGTH, BATCH = 512, 2


def documents() -> np.ndarray:
    return np.stack([np.repeat([0, 1, 2], [200, 12, 300]), np.repeat([0, 1, 2], [1, 400, 111])]).astype(np.int32)


@pytest.mark.parametrize("ranges", [[(0, LENGTH)], [(128, 256), (256, 384)], [(0, 128), (384, 512)]], ids=["whole", "middle", "ends"])
@pytest.mark.parametrize("ids", [None, documents()], ids=["one document", "packed"])
@pytest.mark.parametrize("kernel", ["varlen", "flex", "sdpa"])
def test_kernels_agree_with_the_reference(kernel, ids, ranges):
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = sum(end - start for start, end in ranges)
    q = torch.randn(rows, BATCH, 8, 64, device=DEVICE, generator=generator)
    k, v = (torch.randn(LENGTH, BATCH, 2, 64, device=DEVICE, generator=generator) for _ in range(2))
    mask = AttentionMask(ranges, ids, DEVICE)

    def run(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = KERNELS[name].attend(*inputs, KERNELS[name].plan(mask, BATCH))
        out.sin().sum().backward()
        return [out.detach().float(), *(x.grad.float() for x in inputs)]

    exact, rounded, ours = run("reference", torch.float32), run("reference", torch.bfloat16), run(kernel, torch.bfloat16)
    for e, r, o in zip(exact, rounded, ours, strict=True):
        assert (o - e).norm() <= 2 * (r - e).norm() + 1e-3 * e.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_training_lowers_the_loss(compiled):
    config = RunConfig(model=ModelConfig(num_layers=2, hidden_size=256, ffn_hidden_size=512, vocab_size=1000))
    config.data.seq_length, config.optimizer.bf16, config.parallel.compile_blocks = LENGTH, True, compiled
    tokens = np.random.default_rng(0).integers(0, 1000, (1, BATCH, LENGTH + 1))
    ids = documents()[None]
    positions = np.broadcast_to(np.arange(LENGTH), ids.shape)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], np.ones(ids.shape, bool), ids, positions)
    groups = initialize_groups(config.parallel)
    try:
        engine = build_engine(config, groups)
        losses = []
        for _ in range(20):
            losses.append(engine.forward_backward(batch, NextToken())["loss"])
            engine.clip_gradients(1.0)
            engine.optimizer_step(1e-3)
    finally:
        destroy_groups()
    assert not dist.is_initialized()
    assert losses[-1] < 0.8 * losses[0]
