"""Bytes on one rank over one step: the pipeline's own schedule is played, and what each action takes and gives back is booked by tensor
name, so that the peak is a moment and not a sum of peaks (paper, section 3.3.2: "a memory consumption estimator").

Neither the allocator's fragmentation, NCCL's buffers nor the CUDA context are in it: see fit.py. Imports no torch.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ChunkLayers, layers_of_chunks
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import Phase
from megatron_llama3.model.sharding import layer_weights
from megatron_llama3.parallel.schedule import Action, Timed, make_timeline
from megatron_llama3.planning import activations
from megatron_llama3.planning.activations import BYTES, vocabulary_rows

KINDS = ("weights", "gradients", "optimizer", "activations", "temporaries")


@dataclass(frozen=True)
class Peak:
    """The fullest moment of one rank's step. `held`: (kind, tensor name) -> bytes, of all layers and micro-batches together."""

    stage: int
    moment: str
    held: dict[tuple[str, str], int]

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def of(self, kind: str) -> int:
        return sum(size for (k, _), size in self.held.items() if k == kind)

    def largest(self, count: int) -> list[tuple[str, int]]:
        """Tensor name -> bytes, largest first."""
        return [(name, size) for (_, name), size in Counter(self.held).most_common(count)]


class Ledger:
    """What is held now, and what was held at the fullest moment."""

    def __init__(self):
        self.held: Counter[tuple[str, str]] = Counter()
        self.now, self.moment = 0, "start"
        self.peak, self.peak_moment, self.at_peak = 0, "", {}

    def take(self, kind: str, tensors: dict[str, int]) -> None:
        for name, size in tensors.items():
            self.held[kind, name] += size
            self.now += size
        if self.now > self.peak:
            self.peak, self.peak_moment, self.at_peak = self.now, self.moment, dict(self.held)

    def give(self, kind: str, tensors: dict[str, int]) -> None:
        for name, size in tensors.items():
            self.held[kind, name] -= size
            self.now -= size

    def briefly(self, kind: str, tensors: dict[str, int]) -> None:
        self.take(kind, tensors)
        self.give(kind, tensors)


def timeline_of(config: RunConfig, microbatches: int) -> list[list[Timed]]:
    """The run's pipeline schedule, as training runs it."""
    p = config.parallel
    zero_bubble = p.pipeline_schedule == "zero-bubble"
    return _timeline(p.pipeline_model_parallel_size, p.chunks_per_rank, microbatches, p.microbatch_group_size_per_vp_stage, zero_bubble)


_timeline = lru_cache(maxsize=8)(make_timeline)  # phases of a ramp, and what fit.py tries, share it


def microbatches_of(config: RunConfig, phase: Phase) -> int:
    """M: micro-batches of one data-parallel rank in one step."""
    return phase.global_batch_size // (config.training.micro_batch_size * config.parallel.data_parallel_size)


def peak_memory(config: RunConfig, phase: Phase) -> Peak:
    """The peak of the pipeline rank that needs most in this phase of the run."""
    return max(peaks(config, phase), key=lambda peak: peak.total)


def peaks(config: RunConfig, phase: Phase) -> list[Peak]:
    """The peak of each pipeline rank, on TP rank 0 (no other TP rank has more)."""
    group = config.parallel.microbatch_group_size_per_vp_stage or config.parallel.pipeline_model_parallel_size
    # More micro-batches than the pipeline can hold twice over change nothing but the time this takes.
    microbatches = min(microbatches_of(config, phase), 2 * (group + config.parallel.pipeline_model_parallel_size))
    return [rank_peak(config, phase, rank, timeline) for rank, timeline in enumerate(timeline_of(config, microbatches))]


def rank_peak(config: RunConfig, phase: Phase, stage: int, timeline: list[Timed]) -> Peak:
    ledger = play_step(config, phase, stage, timeline)
    return Peak(stage, ledger.peak_moment, {key: size for key, size in ledger.at_peak.items() if size})


def play_step(config: RunConfig, phase: Phase, stage: int, timeline: list[Timed]) -> Ledger:
    """The books of a stage when its last action is done and the optimizer has not stepped yet."""
    step = _Step(config, phase, stage)
    step.play([timed.action for timed in timeline])
    return step.ledger


# --- weights, gradients and optimizer state ---


def layer_weight_sizes(model: ModelConfig, tp_size: int) -> dict[str, int]:
    """Parameters of each weight of one block on TP rank 0, by the weight table."""
    return {name.removesuffix(".weight"): math.prod(spec.local_shape(tp_size, 0)) for name, spec in layer_weights(model).items()}


@dataclass(frozen=True)
class StateBytes:
    """Bytes a parameter, as an engine keeps them. `always`: (kind, name) -> all through the step."""

    always: dict[tuple[str, str], float]
    gathered: float = 0
    """weights, from a chunk's first forward to its last backward"""
    whole: float = 0
    """gradients, from a chunk's first backward to their reduction"""
    reduced: float = 0
    """gradients, from the first reduction to the end of the step"""
    fresh: float = 0
    """gradients as a layer's backward pass makes them, until they are added to the whole ones"""
    reduction: float = 0
    """the buffer that a layer's gradients are reduced from"""


def state_bytes(config: RunConfig) -> StateBytes:
    """The engines as they are (training/fsdp2_engine.py, training/deepspeed_engine.py); Adam's two moments in the main dtype."""
    p, compute, main = config.parallel, BYTES[config.optimizer.compute_dtype], BYTES[config.optimizer.main_dtype]
    shards = p.data_parallel_size * p.context_parallel_size
    fresh = compute if compute != main else 0
    if p.engine == "fsdp" and shards == 1 and compute == main:  # no FSDP: the weights are the master weights
        return StateBytes({("weights", "weights"): main, ("optimizer", "Adam's moments"): 2 * main}, whole=main)
    sharded = {("optimizer", "master weights"): main / shards, ("optimizer", "Adam's moments"): 2 * main / shards}
    if p.engine == "fsdp":
        return StateBytes(sharded, gathered=compute, whole=main, reduced=main / shards, fresh=fresh, reduction=main)
    always = {
        ("weights", "weights"): compute / (shards if p.zero_stage == 3 else 1),
        ("gradients", "gradients"): main / (shards if p.zero_stage >= 2 else 1),
    }
    return StateBytes(always | ({} if p.optimizer_cpu_offload else sharded), fresh=fresh)


# --- one rank's step ---


class _Step:
    """Plays a rank's actions into a ledger. A chunk is its layers and, around them, `ends`: embedding, last norm and output layer."""

    def __init__(self, config: RunConfig, phase: Phase, stage: int):
        self.config, self.ledger = config, Ledger()
        p = config.parallel
        self.tokens = config.training.micro_batch_size * phase.seq_length // p.context_parallel_size
        chunks = enumerate(layers_of_chunks(config.model, p))
        self.chunks = {number: chunk for number, chunk in chunks if number % p.pipeline_model_parallel_size == stage}
        self.state = state_bytes(config)
        self.sizes = activations.sizes(config, self.tokens)
        self.kept_by_chunk = {n: activations.kept_by_chunk(config, self.tokens, chunk) for n, chunk in self.chunks.items()}
        self.kept_by_layer = activations.kept_by_layer(config, self.tokens)
        self.made_again_by_layer = activations.made_again_by_layer(config, self.tokens)
        self.deferred_by_layer = activations.deferred_by_layer(config, self.tokens)
        self.forward_working = {"forward pass of a layer": activations.forward_working(config, self.tokens)}
        self.backward_steps = activations.backward_steps(config, self.tokens)
        self.layer_weights = layer_weight_sizes(config.model, p.tensor_model_parallel_size)
        self.layer_parameters = sum(self.layer_weights.values())
        self.done: Counter[tuple[str, int]] = Counter()
        self._take_what_stays(phase)

    def play(self, actions: list[Action]) -> None:
        self.total = Counter((action.kind, action.chunk) for action in actions)
        self.microbatches = max(self.total.values())
        for action in actions:
            self.ledger.moment = f"{_NAMES[action.kind]} of chunk {action.chunk}, micro-batch {action.microbatch}"
            self.done[action.kind, action.chunk] += 1
            {"F": self._forward, "B": self._backward, "I": self._input_half, "W": self._weight_half}[action.kind](action.chunk)

    def _take_what_stays(self, phase: Phase) -> None:
        parameters = sum(self._parameters(chunk) for chunk in self.chunks.values())
        for (kind, name), size in self.state.always.items():
            self.ledger.take(kind, {name: round(size * parameters)})
        inputs = activations.kept_by_microbatch(self.config, self.tokens, phase.seq_length)
        microbatches = microbatches_of(self.config, phase)
        self.ledger.take("activations", {name: size * microbatches for name, size in inputs.items()})
        if self.config.parallel.pipeline_model_parallel_size > 1:
            self.ledger.take("activations", {"a message that leaves and one that comes": 2 * self.sizes.between})

    def _ends(self, chunk: ChunkLayers) -> int:
        """Parameters of a chunk outside its layers. A tied matrix is held once where one stage has both of its users."""
        matrix = vocabulary_rows(self.config) * self.config.model.hidden_size
        is_shared = chunk.has_embedding and chunk.has_output and not self.config.model.untie_embeddings_and_output_weights
        matrices = chunk.has_embedding + chunk.has_output - is_shared
        return matrices * matrix + chunk.has_output * self.config.model.hidden_size

    def _parameters(self, chunk: ChunkLayers) -> int:
        return len(chunk.layers) * self.layer_parameters + self._ends(chunk)

    # --- forward ---

    def _forward(self, number: int) -> None:
        chunk = self.chunks[number]
        if self.done["F", number] == 1:
            self._gather(chunk)
        self.ledger.take("activations", self.kept_by_chunk[number])
        if chunk.has_embedding:
            self.ledger.briefly("temporaries", {"embedding's result before it is summed over TP": 2 * self.sizes.gathered})
        if chunk.layers:
            self.ledger.briefly("temporaries", self.forward_working)
        if chunk.has_output:
            self.ledger.briefly("temporaries", {"logits": activations.output_working(self.config, self.tokens)[0]})

    def _gather(self, chunk: ChunkLayers) -> None:
        """FSDP gathers a layer into a flat buffer and copies it out of there."""
        for parameters in [self._ends(chunk), *[self.layer_parameters] * len(chunk.layers)]:
            size = round(parameters * self.state.gathered)
            self.ledger.take("weights", {"gathered weights": size})
            self.ledger.briefly("temporaries", {"all-gather buffer": size})

    # --- backward ---

    def _backward(self, number: int) -> None:
        chunk = self.chunks[number]
        self.ledger.take("activations", {"gradient between stages": self.sizes.between})
        if chunk.has_output:
            self._output_backward()
        for layers, recomputed in reversed(activations.layer_units(self.config, len(chunk.layers))):
            self._unit_backward(number, layers, recomputed)
        if chunk.has_embedding:
            self._embedding_backward()
        self._add_gradients(number, self._ends(chunk))
        self.ledger.give("activations", {"gradient between stages": self.sizes.between})
        self._free_weights(number)

    def _unit_backward(self, number: int, layers: int, recomputed: bool) -> None:
        if recomputed:
            self.ledger.briefly("temporaries", self.forward_working)
            for _ in range(layers):
                self.ledger.take("activations", self.kept_by_layer)
        for _ in range(layers):
            self._layer_backward()
            self._add_gradients(number, self.layer_parameters)
        if recomputed:
            self.ledger.give("activations", activations.kept_by_recomputed(self.config, self.tokens))

    def _layer_backward(self) -> None:
        fresh, held = 0, self.kept_by_layer | self.made_again_by_layer
        self.ledger.take("activations", self.made_again_by_layer)
        for step in self.backward_steps:
            made = round(self.state.fresh * sum(self.layer_weights[name] for name in step.weights))
            self.ledger.take("temporaries", {"weight gradients of a layer": made})
            self.ledger.briefly("temporaries", {"backward pass of a layer": step.working})
            self.ledger.give("activations", {name: held[name] for name in step.frees if name in held})
            fresh += made
        self.ledger.give("temporaries", {"weight gradients of a layer": fresh})

    def _output_backward(self) -> None:
        _, working = activations.output_working(self.config, self.tokens)
        self.ledger.briefly("temporaries", {"gradients of the output layer": working})
        self.ledger.give("activations", activations.kept_by_output(self.config, self.tokens))

    def _embedding_backward(self) -> None:
        weight = round(vocabulary_rows(self.config) * self.config.model.hidden_size * self.state.fresh)
        self.ledger.briefly("temporaries", {"gradient of the embedding": 2 * self.sizes.gathered + weight})
        self.ledger.give("activations", activations.kept_by_embedding(self.config, self.tokens))

    def _add_gradients(self, number: int, parameters: int) -> None:
        """What a layer's backward pass made is added to its whole gradients, in the main dtype, and reduced if it is time."""
        done, whole = self.done[self._finishes, number], {"whole gradients": round(parameters * self.state.whole)}
        if (done - 1) % self._reduce_every == 0:
            self.ledger.take("gradients", whole)
        if self.state.reduced and (done % self._reduce_every == 0 or done == self.total[self._finishes, number]):
            self.ledger.briefly("temporaries", {"reduce-scatter buffer": round(parameters * self.state.reduction)})
            self.ledger.give("gradients", whole)
            if done <= self._reduce_every:
                self.ledger.take("gradients", {"reduced gradients": round(parameters * self.state.reduced)})

    @property
    def _reduce_every(self) -> int:
        """Backward passes of a chunk between reductions."""
        return self.config.parallel.reduce_gradients_every or self.microbatches

    @property
    def _finishes(self) -> str:
        """The action that ends a micro-batch's work on a chunk."""
        return "W" if self.config.parallel.pipeline_schedule == "zero-bubble" else "B"

    def _free_weights(self, number: int) -> None:
        if self.done[self._finishes, number] == self.total[self._finishes, number]:
            self.ledger.give("weights", {"gathered weights": self._gathered(self.chunks[number])})

    def _gathered(self, chunk: ChunkLayers) -> int:
        return round(self._ends(chunk) * self.state.gathered) + len(chunk.layers) * round(self.layer_parameters * self.state.gathered)

    # --- the two halves of zero bubble ---

    def _input_half(self, number: int) -> None:
        chunk = self.chunks[number]
        self.ledger.take("activations", {"gradient between stages": self.sizes.between})
        if chunk.has_output:
            self._output_backward()
        for _ in chunk.layers:
            working = max(step.working for step in self.backward_steps)
            self.ledger.briefly("temporaries", {"backward pass of a layer": working})
            self.ledger.take("activations", self.deferred_by_layer)
            self.ledger.give("activations", self.kept_by_layer)
        if chunk.has_embedding:
            self._embedding_backward()
        self.ledger.give("activations", {"gradient between stages": self.sizes.between})

    def _weight_half(self, number: int) -> None:
        chunk = self.chunks[number]
        fresh = {"weight gradients of a layer": round(self.state.fresh * self.layer_parameters)}
        for _ in chunk.layers:
            self.ledger.take("temporaries", fresh)
            self.ledger.give("activations", self.deferred_by_layer)
        for _ in chunk.layers:
            self.ledger.give("temporaries", fresh)
            self._add_gradients(number, self.layer_parameters)
        self._add_gradients(number, self._ends(chunk))
        self._free_weights(number)


_NAMES = {"F": "forward", "B": "backward", "I": "input half", "W": "weight half"}
