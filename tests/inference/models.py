"""Small models with random weights, built on the forked ranks of a test."""

import functools
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_llama3.checkpoint.lazy_tensor import WeightSource, from_tensor
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.inference.load import load_llama
from megatron_llama3.model.attention import AttentionMask
from megatron_llama3.model.llama import Llama, ModelInputs
from megatron_llama3.model.sharding import weight_table
from megatron_llama3.parallel.groups import destroy_groups, initialize_groups
from megatron_llama3.planning.local_ranks import run_ranks

SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 97}
SMALL = SHAPE | {"max_position_embeddings": 64, "rotary_base": 500, "untie_embeddings_and_output_weights": True}


def random_source(seed: int = 0, **changes) -> WeightSource:
    """A model whose logits differ from token to token: weights of 0.02 would make them all alike."""
    config = ModelConfig(**(SMALL | changes))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, spec in weight_table(config).items():
        drawn = torch.randn(spec.shape, dtype=torch.float64, generator=generator)
        weights[name] = from_tensor(1 + 0.1 * drawn if spec.initial == "ones" else drawn / spec.shape[-1] ** 0.5)
    return WeightSource(config, weights)


def on_one_rank(test):
    """Runs a test in a forked process: one in which gloo has run could not fork working ranks any more."""

    @functools.wraps(test)
    def wrapper(**fixtures):
        run_ranks(1, functools.partial(_without_result, test, fixtures))

    return wrapper


def _without_result(test, fixtures) -> None:
    test(**fixtures)


@contextmanager
def loaded(source: WeightSource, dtype: torch.dtype = torch.float64):
    """The model of `source` on the ranks of a test's world as TP."""
    size = dist.get_world_size()
    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=size, world_size=size))
    try:
        yield load_llama(source, groups, dtype)
    finally:
        destroy_groups()


def full_logits(model: Llama, tokens: list[int]) -> torch.Tensor:
    """[n, V] of one forward pass without a cache."""
    ids = torch.tensor(tokens).unsqueeze(1)
    positions = torch.arange(len(tokens)).unsqueeze(1)
    with torch.no_grad():
        return model(None, ModelInputs(ids, positions, AttentionMask([(0, len(tokens))])))[:, 0]
