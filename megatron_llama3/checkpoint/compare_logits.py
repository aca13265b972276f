"""Logits of stored weights in fp32, so that a conversion can compare both of its sides before it says that it is done.

Our model runs layer by layer, each read when its turn comes: memory holds one layer, or the embedding. Hugging Face folders and GGUF files
go through transformers where it is installed and the model fits, which checks names, row order and config against code that is not ours.
"""

import importlib.util
import io
from contextlib import redirect_stderr
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llama3.checkpoint.free_memory import free_memory
from megatron_llama3.checkpoint.lazy_tensor import WeightSource, cast
from megatron_llama3.config.errors import UserError
from megatron_llama3.model.attention import AttentionMask
from megatron_llama3.model.llama import BuildOptions, Llama, ModelInputs
from megatron_llama3.model.rope import rotary_frequencies
from megatron_llama3.parallel.tensor_parallel import TensorParallel

SAMPLE_TOKENS = 64
MAX_RELATIVE_ERROR = 1e-4  # of the logits' norm; two correct fp32 models differ by about 1e-6, permuted rows by about 1


def compare_sides(first: torch.Tensor, second: torch.Tensor) -> float:
    """Relative difference of two sides' logits. Raises UserError where it is above MAX_RELATIVE_ERROR or not a number."""
    if first.shape != second.shape:
        raise UserError(f"the two sides have logits of shapes {list(first.shape)} and {list(second.shape)}: the conversion is wrong")
    error = float((first - second).norm() / first.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not error <= MAX_RELATIVE_ERROR:
        raise UserError(f"the logits of the two sides differ by {error:.1e} of their norm (at most {MAX_RELATIVE_ERROR:.0e} is rounding)")
    return error


def side_logits(kind: str, path: Path, source: WeightSource, dtype: torch.dtype | None) -> tuple[torch.Tensor, str]:
    """(fp32 logits [SAMPLE_TOKENS, V] on fixed tokens, "transformers" or "our model"), weights rounded to `dtype` first."""
    tokens = torch.randint(source.model.vocab_size, (SAMPLE_TOKENS,), generator=torch.Generator().manual_seed(0))
    if kind in ("hf", "gguf") and importlib.util.find_spec("transformers") and _fits(source):
        return _transformers_logits(kind, path, tokens, dtype), "transformers"
    rounded = {name: cast(tensor, dtype) for name, tensor in source.weights.items()}
    return our_logits(replace(source, weights=rounded), tokens), "our model"


@torch.no_grad()
def our_logits(source: WeightSource, tokens: torch.Tensor) -> torch.Tensor:
    """tokens int64 [s] -> fp32 logits [s, V] of our model, one chunk of it in memory at a time."""
    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        inputs = ModelInputs(tokens.unsqueeze(1), torch.arange(len(tokens)).unsqueeze(1), AttentionMask([(0, len(tokens))]))
        x = _chunk(source, [], has_embedding=True)(None, inputs)
        for layer in range(source.model.num_layers):
            x = _chunk(source, [layer])(x, inputs)
        return _chunk(source, [], has_output=True)(x, inputs).squeeze(1)
    finally:
        if own_group:
            dist.destroy_process_group()


def _chunk(source: WeightSource, layers: list[int], has_embedding: bool = False, has_output: bool = False) -> Llama:
    """A part of the model with its weights in fp32."""
    alone = dist.new_group([dist.get_rank()]) if dist.get_world_size() > 1 else dist.group.WORLD
    options = BuildOptions(device=torch.device("meta"), attention_kernel="sdpa")
    model = Llama(source.model, TensorParallel(alone), alone, layers, has_embedding, has_output, options)
    model.frequencies = rotary_frequencies(source.model)
    for name, _ in list(model.named_parameters()):
        stored = name if name in source.weights else "tok_embeddings.weight"  # a tied output layer
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(source.weights[stored].read().float(), requires_grad=False))
    return model


def _transformers_logits(kind: str, path: Path, tokens: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder, options = (path, {}) if kind == "hf" else (path.parent, {"gguf_file": path.name})
    options |= {"dtype": torch.float32, "local_files_only": True, "attn_implementation": "sdpa"}  # whatever the file asks for
    try:
        with redirect_stderr(io.StringIO()):  # progress bars; failures are exceptions
            model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except Exception as error:  # of any kind: a field that our model has no use for may be damaged
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: transformers cannot read it ({type(error).__name__}: {reason}); --no-verify goes without it") from None
    with torch.no_grad():
        for weight in model.parameters() if dtype else ():
            weight.copy_(weight.to(dtype))
        return model(tokens.unsqueeze(0)).logits[0]


def _fits(source: WeightSource) -> bool:
    """Whether the whole model in fp32 takes at most two thirds of the memory that is free."""
    needed = 4 * sum(prod(tensor.shape) for tensor in source.weights.values())
    return 1.5 * needed < free_memory()
