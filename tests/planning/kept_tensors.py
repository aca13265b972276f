"""What a rank of a real run keeps for backward passes, tensor by tensor: autograd's saved-tensor hooks say what, the model's own modules by
which name; a count of live storages says that nothing is kept besides.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.config.run import RunConfig
from megatron_llama3.model import llama
from megatron_llama3.model.llama import Block, Llama, ModelInputs
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.pipeline_parallel import PipelineExecutor
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.planning.activations import kept_by_chunk
from megatron_llama3.planning.equivalence import synthetic_batch
from megatron_llama3.planning.live_memory import LiveMemory
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.objectives import NextToken

ONLY_ON_A_CPU = "only on a CPU"


@dataclass
class KeptByForward:
    """One forward pass of a chunk. `planned` and `measured`: tensor name -> bytes; `live`: how far it raised what is alive."""

    chunk: int
    planned: dict[str, int]
    measured: dict[str, int]
    live: int


@dataclass
class _Names:
    """Storage -> tensor name, as modules see their inputs and outputs go by. Holds these tensors, so that no address comes twice."""

    of: dict[int, list[str]] = field(default_factory=dict)
    """One storage may be shared: the gathered keys and values of CP ranks come in one."""
    held: list[Tensor] = field(default_factory=list)

    def give(self, tensor: Tensor, name: str) -> None:
        names = self.of.setdefault(_storage(tensor), [])
        if name not in names:
            names.append(name)
        self.held.append(tensor)


def _shared(inputs: ModelInputs) -> list[Tensor]:
    return [*(inputs.rotary or ()), *(t for entry in inputs.plan or () for t in entry if isinstance(t, Tensor))]


def _bytes(tensors: list[Tensor | None]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure_rank(config: RunConfig) -> list[KeptByForward]:
    """Every forward pass of one step but a chunk's first, which gathers weights, on a rank of a gloo world; nothing on other TP ranks than
    the first, whose parts of the vocabulary may be smaller."""
    groups = initialize_groups(config.parallel)
    memory, forward, found = LiveMemory(), PipelineExecutor._COMMANDS["F"], []
    contents = layers_of_chunks(config.model, config.parallel)
    tokens = config.training.micro_batch_size * config.data.seq_length // config.parallel.context_parallel_size

    def measured_forward(executor, action):
        chunk = executor.chunks[action.chunk]
        inputs = executor.microbatches[action.microbatch]
        planned_before, before = inputs.plan, memory.born
        recorder = _Recorder(chunk)
        with recorder:
            forward(executor, action)
        measured = recorder.kept(inputs)
        recorder.names.held.clear()
        # What came in is older and is kept, what goes out is new and is not; all chunks of a micro-batch share a plan and a rotary table.
        received = executor.inputs.get((action.chunk, action.microbatch))
        shared = [] if planned_before is not None else _shared(inputs)
        sent = executor.outputs.get((action.chunk, action.microbatch))
        moved = _bytes([received]) - _bytes([sent, *shared])
        planned = kept_by_chunk(config, tokens, contents[action.chunk])
        most = sum(planned.values()) + measured.get(ONLY_ON_A_CPU, 0)
        live = _live_once_gloo_let_go(lambda: memory.live_of_later(before) + moved, most)
        if action.microbatch > 0:
            found.append(KeptByForward(action.chunk, planned, measured, live))

    with memory, patch.dict(PipelineExecutor._COMMANDS, F=measured_forward):
        engine = build_engine(config, groups)
        engine.forward_backward(synthetic_batch(config, 0, groups.at.dp, groups.topology.dp), NextToken())
    return found if groups.at.tp == 0 else []


def _live_once_gloo_let_go(live: Callable[[], int], expected: float) -> int:
    """Its threads let go of a collective's tensors a moment after it is done: what is alive once it is as expected, or after 2 s."""
    deadline = time.monotonic() + 2
    while live() > 1.005 * expected and time.monotonic() < deadline:
        time.sleep(0.001)
    return live()


class _Recorder:
    """While it is entered: what autograd saves in a chunk's forward pass, with the name of the part that saves it."""

    def __init__(self, chunk: Llama):
        self.chunk, self.names, self.saved, self.within = chunk, _Names(), [], []
        self.hooks = []

    def __enter__(self):
        self.stack = ExitStack()
        for block in self.chunk.layers.values():
            self._watch(block)
        if self.chunk.norm is not None:
            self._name_norm(self.chunk.norm, "norm")
        if self.chunk.tok_embeddings is not None:
            self._mark(self.chunk.tok_embeddings, "embedding")
        self.stack.enter_context(patch.object(llama, "token_log_probs", self._within("output", llama.token_log_probs)))
        self.stack.enter_context(patch.object(TensorParallel, "columns", self._named_columns(TensorParallel.columns)))
        self.stack.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
        return self

    def __exit__(self, *exception):
        self.stack.close()
        for hook in self.hooks:
            hook.remove()

    def _pack(self, tensor: Tensor) -> Tensor:
        self.saved.append((tensor, self.within[-1] if self.within else ""))
        return tensor

    def _watch(self, block: Block) -> None:
        self._name_norm(block.attention_norm, "attention_norm")
        self._name_norm(block.ffn_norm, "ffn_norm")
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(block.attention, name)) is not None:
                self._name_norm(norm, name)
        attend = block.attention.core

        def core(q, k, v, plan):
            for tensor, name in ((q, "queries"), (k, "keys"), (v, "values")):
                self.names.give(tensor, name)
            result = self._within("core", attend)(q, k, v, plan)
            self.names.give(result, "attention.result")
            return result

        self.stack.enter_context(patch.object(block.attention, "core", core))

    def _name_norm(self, norm: torch.nn.Module, name: str) -> None:
        self.hooks.append(norm.register_forward_pre_hook(lambda module, args: self.names.give(args[0], f"{name}.input")))
        self.hooks.append(norm.register_forward_hook(lambda module, args, result: self.names.give(result, f"{name}.output")))
        self._mark(norm, name)

    def _mark(self, module: torch.nn.Module, name: str) -> None:
        self.hooks.append(module.register_forward_pre_hook(lambda module, args: self.within.append(name)))
        self.hooks.append(module.register_forward_hook(lambda module, args, result: self.within.pop() and None))

    def _within(self, name: str, function):
        def run(*args, **kwargs):
            self.within.append(name)
            result = function(*args, **kwargs)
            self.within.pop()
            return result

        return run

    def _named_columns(self, columns):
        def named(tp, x, weights, *rest):
            results = columns(tp, x, weights, *rest)
            if len(results) == 2:
                for tensor, name in zip(results, ("w1x", "w3x")):
                    self.names.give(tensor, f"feed_forward.{name}")
            return results

        return named

    def kept(self, inputs: ModelInputs) -> dict[str, int]:
        """Tensor name -> bytes. Weights and what all layers share of a micro-batch are left out."""
        left_out = [*vars(inputs).values(), *_shared(inputs), *self.chunk.parameters()]
        seen = {_storage(_local(t)) for t in left_out if isinstance(t, Tensor)}
        sizes: Counter[str] = Counter()
        for tensor, within in self.saved:
            is_of_the_loss = tensor.numel() == 1 or (not within and tensor.dtype == torch.bool)  # the loss mask is the micro-batch's
            if _storage(tensor) not in seen and not is_of_the_loss:
                seen.add(_storage(tensor))
                names = self.names.of.get(_storage(tensor)) or [self._name_by_shape(tensor, within)]
                for name in names:
                    sizes[name] += tensor.untyped_storage().nbytes() // len(names)
        return dict(sizes)

    def _name_by_shape(self, tensor: Tensor, within: str) -> str:
        """Of what a part made for itself alone. What only a CPU keeps is named so: x / rms(x), and the attention mask in float."""
        if within.endswith("norm"):
            return f"{within}.inverse_rms" if tensor.shape[-1] == 1 else ONLY_ON_A_CPU
        if within == "core":
            is_result = tensor.shape[1] > 1  # heads; a mask is the same for all
            return "log_sums" if tensor.dim() == 3 else "attention.result by range" if is_result else ONLY_ON_A_CPU
        if within == "embedding":
            return f"embedding.{'elsewhere' if tensor.dtype == torch.bool else 'rows'}"
        if within == "output" and tensor.dim() == 2:
            is_weight = len(tensor) == len(_local(self.chunk.output.weight))
            return f"output.{'weight' if is_weight else 'input'}_gradient"
        return f"{within}: {tuple(tensor.shape)} {tensor.dtype}"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
