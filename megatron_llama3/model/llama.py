"""Llama 3 (paper, section 3.2): norm, feed-forward, block, model. A `Llama` is the whole model or one pipeline chunk of it; layers keep
their global numbers, so that a weight has one name everywhere.

Shapes: s = sequence on this rank (of the whole sequence / CP, and / TP between blocks under sequence parallelism), b = micro-batch,
h = hidden size. Activations are [s, b, h] throughout: what passes between pipeline stages is contiguous.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.attention import KERNELS, Attention, AttentionMask, choose_kernel
from megatron_llama3.model.initial_weights import initial_weight
from megatron_llama3.model.loss import token_log_probs
from megatron_llama3.model.norm import RMSNorm
from megatron_llama3.model.rope import rotary_frequencies, rotary_table
from megatron_llama3.model.sharding import weight_table
from megatron_llama3.parallel.linear import Recipe
from megatron_llama3.parallel.tensor_parallel import ParallelLinear, TensorParallel, VocabParallelEmbedding, local_part


@dataclass
class ModelInputs:
    """What every stage reads for itself of one micro-batch: this CP rank's part of the sequence, in the order it holds it."""

    tokens: Tensor
    """int64 [s, b]"""
    position_ids: Tensor
    """int64 [s, b] or [s, 1]"""
    mask: AttentionMask
    targets: Tensor | None = None
    """int64 [s, b]; without targets the model returns logits"""
    loss_weights: Tensor | None = None
    """[s, b]: set where the loss will be the sum of these times the log-probabilities, times one number (see loss.py)"""
    rotary: tuple[Tensor, Tensor] | None = None
    plan: Any = None
    """The rotary table and the attention kernel's plan, made by the first chunk on this rank that has layers."""


@dataclass(frozen=True)
class BuildOptions:
    """How a model is built, beside what it is; the recompute fields are Megatron-LM's flags."""

    dtype: torch.dtype = torch.float32
    """of the weights as built"""
    compute_dtype: torch.dtype = torch.float32
    """of weights and activations in forward: an engine may cast"""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 1234
    attention_kernel: str = "auto"
    loss_chunk_size: int = 1024
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: Sequence[str] = ()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class SwiGlu(Function):
    """silu(gate) * up; both inputs are kept and nothing else."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        # d silu(gate) / d gate is one fused kernel; the product itself is w2's to make again.
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, weight: Callable[[str], Tensor], tp: TensorParallel):
        super().__init__()
        self.w1, self.w2, self.w3 = (ParallelLinear(weight(f"feed_forward.{w}.weight")) for w in ("w1", "w2", "w3"))
        self.tp = tp

    def forward(self, x: Tensor, recipe: Recipe | None = None) -> Tensor:
        """x [s, b, h] -> the same shape. `recipe`: how x is made again in the backward pass, where it is not kept."""
        gate, up = self.tp.columns(x, [self.w1.local, self.w3.local], recipe)  # each [s, b, f/t], s whole
        product = Recipe(swiglu, (gate.detach(), up.detach()))
        return self.tp.row(SwiGlu.apply(gate, up), self.w2.local, product)


class Block(nn.Module):
    """h = x + Attention(norm(x)); h + FeedForward(norm(h)). What `recompute` names is made again in the backward pass: `layernorm`, both
    norms' outputs, which a column layer reads; `mlp`, the feed-forward with its norm."""

    def __init__(
        self, weight: Callable[[str], Tensor], config: ModelConfig, tp: TensorParallel, cp_group, kernel: str, recompute: Sequence[str] = ()
    ):
        super().__init__()
        self.attention_norm = RMSNorm(weight("attention_norm.weight"), config.norm_epsilon)
        self.attention = Attention(weight, config, tp, cp_group, kernel)
        self.ffn_norm = RMSNorm(weight("ffn_norm.weight"), config.norm_epsilon)
        self.feed_forward = FeedForward(weight, tp)
        self.recompute = recompute

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], plan: Any, cache=None) -> Tensor:
        # x, h [s/t, b, h]: the residual stream, cut along the sequence under sequence parallelism
        h = x + self.attention(self.attention_norm(x), rotary, plan, cache, self._recipe(self.attention_norm, x))
        if "mlp" in self.recompute and torch.is_grad_enabled():
            return h + checkpoint(self._feed_forward, h, use_reentrant=False, preserve_rng_state=False)
        return h + self._feed_forward(h)

    def _feed_forward(self, h: Tensor) -> Tensor:
        return self.feed_forward(self.ffn_norm(h), self._recipe(self.ffn_norm, h))

    def _recipe(self, norm: RMSNorm, x: Tensor) -> Recipe | None:
        return norm.recipe(x) if "layernorm" in self.recompute else None


class Llama(nn.Module):
    """The layers `layers` of the model, with the embedding before or the output layer after them where this chunk has those.

    Initial weights are a function of (weight name, seed) and equal under every layout; with `options.device` "meta" none are drawn.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        cp_group: dist.ProcessGroup,
        layers: Sequence[int] | None = None,
        has_embedding: bool = True,
        has_output: bool = True,
        options: BuildOptions | None = None,
    ):
        super().__init__()
        options = options or BuildOptions()
        self.config, self.tp, self.options = config, tp, options
        self.specs = weight_table(config)
        kernel = choose_kernel(options.attention_kernel, options.device, options.compute_dtype)
        self.plan_attention = KERNELS[kernel].plan
        self.layers = nn.ModuleDict()
        for number in range(config.num_layers) if layers is None else layers:
            self.layers[str(number)] = Block(self._weights_of(f"layers.{number}."), config, tp, cp_group, kernel, options.recompute_modules)
        self.tok_embeddings = self.norm = self.output = None
        weight = self._weights_of("")
        if has_embedding:
            self.tok_embeddings = VocabParallelEmbedding(weight("tok_embeddings.weight"), self._first_row(), tp)
        if has_output:
            self.norm = RMSNorm(weight("norm.weight"), config.norm_epsilon)
            self.output = self._output_layer(weight)
        frequencies = rotary_frequencies(config, torch.promote_types(options.compute_dtype, torch.float32))
        self.register_buffer("frequencies", frequencies.to(options.device), persistent=False)

    def forward(self, x: Tensor | None, inputs: ModelInputs, caches: dict[int, object] | None = None) -> Tensor:
        """x is None in a chunk with the embedding, else [s, b, h]. Returns [s, b, h], or after the output layer log p(target) [s, b]
        (logits [s, b, V/t] without targets)."""
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(inputs.tokens)
        if self.layers and inputs.plan is None:  # once a micro-batch and rank: all layers and further chunks share it
            inputs.rotary = rotary_table(inputs.position_ids, self.frequencies)
            inputs.plan = self.plan_attention(inputs.mask, inputs.tokens.shape[1])
        for group, recompute in self._layer_groups():
            if recompute and torch.is_grad_enabled():
                x = checkpoint(self._run, group, x, inputs.rotary, inputs.plan, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._run(group, x, inputs.rotary, inputs.plan, caches)
        return x if self.output is None else self._head(x, inputs)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Global name -> this rank's part. A tied output layer goes by the embedding's name, also on a stage without the embedding."""
        for name, parameter in self.named_parameters():
            is_tied = name == "output.weight" and not self.config.untie_embeddings_and_output_weights
            yield "tok_embeddings.weight" if is_tied else name, parameter

    def _run(self, group: list[str], x: Tensor, rotary, plan, caches=None) -> Tensor:
        for number in group:
            x = self.layers[number](x, rotary, plan, caches[int(number)] if caches else None)
        return x

    def _layer_groups(self) -> list[tuple[list[str], bool]]:
        """(layers, recompute them as one) in order, by Megatron's --recompute-method: `uniform` cuts all layers into groups of n,
        `block` recomputes the first n one by one."""
        numbers, o = list(self.layers), self.options
        if o.recompute_granularity != "full":
            return [(numbers, False)]
        n = o.recompute_num_layers or 1
        if o.recompute_method == "block":
            return [([number], True) for number in numbers[:n]] + [(numbers[n:], False)]
        return [(numbers[i : i + n], True) for i in range(0, len(numbers), n)]

    def _head(self, x: Tensor, inputs: ModelInputs) -> Tensor:
        x, targets = self.norm(x), inputs.targets  # [s/t, b, h], [s, b]
        if targets is not None:
            chunk_size = self.options.loss_chunk_size
            return token_log_probs(x, self.output.weight, targets, self._first_row(), self.tp, chunk_size, inputs.loss_weights)
        logits = self.tp.gather_input(x) @ local_part(self.output.weight).T  # [s, b, V/t]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _output_layer(self, weight: Callable[[str], Tensor]) -> nn.Module:
        if self.config.untie_embeddings_and_output_weights:
            return ParallelLinear(weight("output.weight"))
        # Tied: the very tensor of the embedding on one stage; on the last of several stages a copy, which starts from the same values.
        layer = ParallelLinear(weight("tok_embeddings.weight") if self.tok_embeddings is None else torch.empty(0))
        if self.tok_embeddings is not None:
            layer.weight = self.tok_embeddings.weight
        return layer

    def _first_row(self) -> int:
        """The first row of the vocabulary that this TP rank holds."""
        return self.specs["tok_embeddings.weight"].local_range(self.tp.size, self.tp.rank)[0]

    def _weights_of(self, prefix: str) -> Callable[[str], Tensor]:
        o = self.options

        def weight(name: str) -> Tensor:
            spec = self.specs[prefix + name]
            if o.device.type == "meta":
                return torch.empty(spec.local_shape(self.tp.size, self.tp.rank), dtype=o.dtype, device="meta")
            return initial_weight(prefix + name, spec, o.seed, self.tp.size, self.tp.rank).to(o.device, o.dtype)

        return weight
