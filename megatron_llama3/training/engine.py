"""The verbs of a data-parallel engine, and what all engines share: this rank's chunks of the model and the pipeline around them.

`training/step.py` knows an engine only by `forward_backward`, `clip_gradients`, and `optimizer_step` or `skip_step`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import Batch
from megatron_llama3.model.llama import BuildOptions, Llama
from megatron_llama3.model.sharding import WeightSpec, weight_table
from megatron_llama3.parallel.groups import ParallelGroups
from megatron_llama3.parallel.pipeline_parallel import DeferredWeightGradients, PipelineExecutor
from megatron_llama3.parallel.schedule import Action, make_timeline, with_communication
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.training.microbatch import Microbatch, make_microbatches
from megatron_llama3.training.objectives import Objective

Trainable = Callable[[str], bool]


def part_of(name: str) -> str:
    """Of a weight's name: "layers.3" of "layers.3.attention.wq.weight", "output" of "output.weight"."""
    return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])


class Engine(ABC):
    """One rank of a run. Weights for which `trainable(name)` is False are frozen."""

    def __init__(self, config: RunConfig, groups: ParallelGroups, trainable: Trainable = lambda name: True):
        self.config, self.groups = config, groups
        self.specs = weight_table(config.model)
        self.compute_dtype = getattr(torch, config.optimizer.compute_dtype)
        self.main_dtype = getattr(torch, config.optimizer.main_dtype)
        zero_bubble = config.parallel.pipeline_schedule == "zero-bubble"
        self.deferred = DeferredWeightGradients() if zero_bubble else None
        self.tp = TensorParallel(groups.tp, config.parallel.sequence_parallel, deferred=self.deferred)
        # Chunks are numbered over the whole pipeline: chunk c lies on stage c % PP.
        self.last_chunk = groups.topology.pp * config.parallel.chunks_per_rank - 1
        self.chunks = self._build_chunks(trainable)
        # A list of actions for each (number of micro-batches, forward only): the batch ramp changes the number.
        self._schedules: dict[tuple[int, bool], list[Action]] = {}

    # --- the verbs ---

    def forward_backward(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """Runs every micro-batch forward and backward. Gradients are left where `clip_gradients` finds them: those of the objective's
        mean over the whole global batch. Returns the mean of each of its terms and the `count` that it is taken over, the same on every
        rank; where nothing counts, they and the gradients are 0."""
        count = self._global_count(batch, objective)
        divisor = max(1, count)
        microbatches = self._microbatches(batch, objective)
        totals = torch.zeros(len(objective.terms), dtype=torch.promote_types(self.main_dtype, torch.float32), device=self.groups.device)

        def on_output(output: Tensor, m: int) -> Tensor:
            loss, sums = objective(output, microbatches[m], self.groups.cp)
            totals.add_(sums / divisor)
            return loss / divisor  # by the whole global batch's count before backward, so that all further reductions are sums

        self._run_pipeline(microbatches, on_output)
        self.finish_gradients()
        return dict(zip(objective.terms, self._sum_over_last_stage(totals).tolist(), strict=True)) | {"count": count}

    @torch.no_grad()
    def evaluate(self, batch: Batch, objective: Objective) -> tuple[dict[str, float], int]:
        """(the sum of each of the objective's terms, the count to divide them by) of a global batch, the same on every rank."""
        microbatches = self._microbatches(batch, objective)
        totals = torch.zeros(len(objective.terms), dtype=torch.float64, device=self.groups.device)

        def on_output(output: Tensor, m: int) -> Tensor:
            loss, sums = objective(output, microbatches[m], self.groups.cp)
            totals.add_(sums)
            return loss

        self._run_pipeline(microbatches, on_output, forward_only=True)
        self.release_gathered_weights()
        sums = self._sum_over_last_stage(totals).tolist()
        return dict(zip(objective.terms, sums, strict=True)), self._global_count(batch, objective)

    @torch.no_grad()
    def read_logits(self, batch: Batch, read: Callable[[Tensor, int], None]) -> None:
        """Runs every micro-batch forward; `read(logits [s, b, V/t], micro-batch)` is called on the last stage. Weights stay gathered."""
        microbatches = make_microbatches(batch, self.groups, self.config.data.document_mask)
        for m in microbatches:
            m.inputs.targets = None

        def on_output(output: Tensor, m: int) -> Tensor:
            read(output, m)
            return output

        self._run_pipeline(microbatches, on_output, forward_only=True)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> float:
        """Scales gradients so that their global norm is at most `max_norm` (0: leaves them). Returns the norm before."""
        gradients = self.owned_gradients()
        square = torch.zeros((), dtype=torch.float64, device=self.groups.device)  # of thousands of tensors
        counted = [g for name, g in gradients.items() if g.numel() and self.counts_in_norm(name)]
        if counted:
            square += torch.stack(torch._foreach_norm(counted)).double().square().sum().to(square.device)
        dist.all_reduce(square)
        norm = square.sqrt().item()  # of all weights on all ranks, the same number everywhere
        if gradients and 0 < max_norm < norm:
            torch._foreach_mul_(list(gradients.values()), max_norm / norm)
        return norm

    @torch.no_grad()
    def layer_gradient_norms(self) -> dict[str, float]:
        """Before clipping: "layers.0", ..., "tok_embeddings", "norm", "output" -> the norm of that part's gradient, the same on every rank;
        0 where all is frozen. Their squares add up to that of the global norm. One reduction."""
        parts = list(dict.fromkeys(map(part_of, self.specs)))
        squares = torch.zeros(len(parts), dtype=torch.float64, device=self.groups.device)
        counted = {name: g for name, g in self.owned_gradients().items() if g.numel() and self.counts_in_norm(name)}
        if counted:
            found = torch.stack(torch._foreach_norm(list(counted.values()))).double().square().to(squares.device)
            squares.index_add_(0, torch.tensor([parts.index(part_of(name)) for name in counted], device=squares.device), found)
        dist.all_reduce(squares)
        return dict(zip(parts, squares.sqrt().tolist(), strict=True))

    @abstractmethod
    def optimizer_step(self, lr: float) -> None:
        """Updates the weights and drops the gradients."""

    @abstractmethod
    def skip_step(self) -> None:
        """Drops the gradients and leaves weights and moments as they are."""

    @abstractmethod
    def state_tensors(self, with_optimizer: bool = True) -> dict[str, Tensor]:
        """ "model.<name>", "optimizer.exp_avg.<name>", "optimizer.exp_avg_sq.<name>" -> tensors of true global shape (DTensors where
        sharded), in the main dtype. Writing into them and calling `state_loaded` restores a run."""

    @abstractmethod
    def state_loaded(self, step: int, with_optimizer: bool = True) -> None:
        """Takes over what was written into `state_tensors`. `step` is Adam's count."""

    # --- what an engine does around the passes of a chunk ---

    def gather_ahead(self, chunk: int) -> None:  # noqa: B027 (most engines have nothing to gather)
        """Begins to gather a chunk's weights, so that its first forward need not wait for all of them."""

    @abstractmethod
    def before_backward(self, chunk: int, reduces: bool, is_last: bool) -> None: ...

    @abstractmethod
    def after_weight_half(self, chunk: int, reduces: bool, is_last: bool) -> None: ...

    @abstractmethod
    def finish_gradients(self) -> None:
        """After the last backward: reduces what is not reduced yet, and sums what ranks of TP and the embedding group hold parts of."""

    @abstractmethod
    def owned_gradients(self) -> dict[str, Tensor]:
        """After `finish_gradients`: this rank's share of each gradient, as tensors of any shape that can be scaled in place."""

    def release_gathered_weights(self) -> None:  # noqa: B027 (most engines have nothing to free)
        """After an evaluation: weights that were gathered for it are freed."""

    # --- shared by engines ---

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        for chunk in self.chunks.values():
            yield from chunk.named_weights()

    def gradient_of(self, name: str) -> Tensor | None:
        """Between `forward_backward` and `optimizer_step` (collective): a weight's gradient, a DTensor where it is cut; None if frozen."""
        return dict(self.named_weights())[name].grad

    def weight(self, name: str) -> WeightSpec:
        return self.specs[name]

    def is_partial_over_tp(self, name: str) -> bool:
        return self.weight(name).gradient_is_partial(self.tp.size, self.tp.sequence_parallel)

    def is_partial_over_ends(self, name: str) -> bool:
        """Whether this rank and the pipeline's other end each have a part of the gradient of their common weight."""
        return self.weight(name).is_tied and self.groups.topology.pp > 1

    def is_second_copy(self, name: str) -> bool:
        """Whether this is the last stage's copy of a weight of the first stage."""
        return self.is_partial_over_ends(name) and self.groups.is_last_stage

    def counts_in_norm(self, name: str) -> bool:
        """Whether this rank adds this weight's gradient to the global norm: replicas count once."""
        is_cut = self.weight(name).split_dim_at(self.tp.size) is not None
        return not self.is_second_copy(name) and (is_cut or self.tp.rank == 0)

    def _decay_groups(self, weights: dict[str, Tensor]) -> list[dict]:
        """AdamW's parameter groups: weights that decay and weights that do not."""
        groups = []
        for decays, decay in ((True, self.config.optimizer.weight_decay), (False, 0.0)):
            tensors = [tensor for name, tensor in weights.items() if self.weight(name).decays == decays]
            groups += [{"params": tensors, "weight_decay": decay}] if tensors else []
        return groups

    def _build_chunks(self, trainable: Trainable) -> dict[int, Llama]:
        c, p = self.config, self.config.parallel
        options = BuildOptions(
            dtype=self.main_dtype,
            compute_dtype=self.compute_dtype,
            device=self.groups.device,
            seed=c.training.seed,
            attention_kernel=c.training.attention_kernel,
            loss_chunk_size=c.training.loss_chunk_size,
            recompute_granularity=p.recompute_granularity,
            recompute_method=p.recompute_method,
            recompute_num_layers=p.recompute_num_layers,
            recompute_modules=p.recompute_modules,
        )
        chunks = {}
        for number, content in enumerate(layers_of_chunks(c.model, p)):
            if number % self.groups.topology.pp != self.groups.at.pp:  # another stage's
                continue
            chunk = Llama(c.model, self.tp, self.groups.cp, content.layers, content.has_embedding, content.has_output, options)
            for name, parameter in chunk.named_weights():
                parameter.requires_grad_(trainable(name))
            if p.compile_blocks:  # one by one: all have the same shapes, and so one compiled graph
                for block in chunk.layers.values():
                    block.compile()
            chunks[number] = chunk
        return chunks

    def _microbatches(self, batch: Batch, objective: Objective) -> list[Microbatch]:
        microbatches = make_microbatches(batch, self.groups, self.config.data.document_mask)
        for m in microbatches:
            m.inputs.loss_weights = objective.loss_weights(m)
        return microbatches

    def _run_pipeline(self, microbatches: list[Microbatch], on_loss: Callable[[Tensor, int], Tensor], forward_only: bool = False) -> None:
        inputs = [m.inputs for m in microbatches]
        s, b = inputs[0].tokens.shape
        # What passes between stages: cut along the sequence under sequence parallelism.
        shape = (s // self.tp.size if self.tp.sequence_parallel else s, b, self.config.model.hidden_size)
        actions = self._schedule(len(inputs), forward_only)
        lanes, every = {"F": self.groups.pp, "B": self.groups.pp_gradients}, self.config.parallel.reduce_gradients_every
        executor = PipelineExecutor(actions, self.chunks, self.last_chunk, lanes, self.groups.device, self, self.deferred, every)
        executor.run(inputs, on_loss, shape, self.compute_dtype)

    def _schedule(self, microbatches: int, forward_only: bool) -> list[Action]:
        if (microbatches, forward_only) not in self._schedules:
            p, pp = self.config.parallel, self.groups.topology.pp
            zero_bubble = p.pipeline_schedule == "zero-bubble"
            group_size = p.microbatch_group_size_per_vp_stage
            timeline = make_timeline(pp, p.chunks_per_rank, microbatches, group_size, zero_bubble, forward_only)
            actions = with_communication(timeline, self.last_chunk + 1)[self.groups.at.pp]
            self._schedules[microbatches, forward_only] = actions
        return self._schedules[microbatches, forward_only]

    def _global_count(self, batch: Batch, objective: Objective) -> int:
        """Over the data-parallel ranks."""
        # Over DP alone: the ranks of TP, CP and PP read the same batch.
        count = torch.tensor(objective.count(batch), device=self.groups.device)
        dist.all_reduce(count, group=self.groups.dp)
        return int(count)

    def _sum_over_last_stage(self, total: Tensor) -> Tensor:
        """The sum over data and context ranks of what the last stage holds (once per TP group), on every rank."""
        if self.tp.rank != 0 or not self.groups.is_last_stage:
            total = torch.zeros_like(total)
        dist.all_reduce(total)
        return total
