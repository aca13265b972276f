"""A whole model for inference out of any stored weights, each TP rank reading its own part only."""

import torch
from torch import Tensor, nn

from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, WeightSource, narrow
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.config.run import DataConfig, RunConfig
from megatron_llama3.config.validate import refusals
from megatron_llama3.model.llama import BuildOptions, Llama
from megatron_llama3.model.rope import rotary_frequencies
from megatron_llama3.model.sharding import WeightSpec
from megatron_llama3.parallel.groups import ParallelGroups
from megatron_llama3.parallel.tensor_parallel import TensorParallel


def check_layout(source: WeightSource, tp_size: int) -> None:
    """Raises UserError where the model cannot be cut over so many TP ranks."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp_size, world_size=tp_size)
    found = list(refusals(RunConfig(model=source.model, parallel=parallel, data=DataConfig(seq_length=1))))
    if found:
        raise UserError("\n".join(found))


def load_llama(source: WeightSource, groups: ParallelGroups, dtype: torch.dtype) -> Llama:
    """The model of `source` with its weights, on this rank's device in `dtype`; TP over `groups.tp`, no pipeline."""
    tp = TensorParallel(groups.tp)
    # Not varlen: it has no kernel for a query that sees a long past, which every decoded token is.
    options = BuildOptions(dtype, dtype, torch.device("meta"), attention_kernel="sdpa")
    model = Llama(source.model, tp, groups.cp, options=options)
    model.frequencies = rotary_frequencies(source.model, torch.promote_types(dtype, torch.float32)).to(groups.device)
    for name in [name for name, _ in model.named_parameters()]:
        value = _part(source.weights[name], model.specs[name], tp.size, tp.rank).to(groups.device, dtype, copy=True)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    if not source.model.untie_embeddings_and_output_weights:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def _part(weight: LazyTensor, spec: WeightSpec, tp_size: int, tp_rank: int) -> Tensor:
    dim = spec.split_dim_at(tp_size)
    if dim is None:
        return weight.read()
    start, end = spec.local_range(tp_size, tp_rank)
    return narrow(weight, dim, start, end - start).read()
