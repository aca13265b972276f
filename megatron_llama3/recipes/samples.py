"""Text that the model of a run writes as it learns, every --sample-interval steps.

Each token is one forward pass of the run's own pipeline, as in an evaluation: no cache, and so any layout and engine. All data-parallel
ranks write the same. For long texts there is recipes/generate.py.
"""

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import Batch
from megatron_llama3.inference.engine import whole_vocabulary
from megatron_llama3.inference.sampling import Sampling, choose
from megatron_llama3.parallel.context_parallel import local_positions
from megatron_llama3.tokenizer.llama3 import load_tokenizer
from megatron_llama3.training.engine import Engine
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult


class Samples:
    """A hook for `training.loop.train`. Collective. Raises UserError for a prompt without room."""

    def __init__(self, engine: Engine, config: RunConfig, observers):
        self.engine, self.log, self.observers = engine, config.logging, observers
        self.tokenizer = load_tokenizer(config.data.tokenizer_model)
        self.prompts = [self.tokenizer.encode(prompt, bos=True) for prompt in self.log.sample_prompts]
        for text, prompt in zip(self.log.sample_prompts, self.prompts):
            if len(prompt) + self.log.sample_tokens > config.model.max_position_embeddings:
                sizes = f"{len(prompt)} tokens, and {self.log.sample_tokens} of --sample-tokens"
                limit = f"--max-position-embeddings {config.model.max_position_embeddings}"
                raise UserError(f"--sample-prompts {text!r}: {sizes}, are more than {limit}")

    def __call__(self, state: TrainState, result: StepResult, is_last: bool) -> None:
        if state.iteration % self.log.sample_interval:
            return
        started = time.monotonic()
        sampling = Sampling(self.log.sample_temperature, seed=state.iteration)
        found = continue_prompts(
            self.engine, self.prompts, self.log.sample_tokens, sampling, self._choosable(), self.observers.watchdog.beat
        )
        self.observers.training_paused(time.monotonic() - started)
        if self.observers.logger is not None:
            texts = [prompt + self.tokenizer.decode(self._until_stop(ids)) for prompt, ids in zip(self.log.sample_prompts, found)]
            self.observers.logger.sampled(state, texts)

    def _choosable(self) -> int:
        return min(self.tokenizer.vocab_size, self.engine.config.model.vocab_size)

    def _until_stop(self, ids: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(ids) if token in self.tokenizer.stop_ids]
        return ids[: ends[0]] if ends else ids


def continue_prompts(
    engine: Engine, prompts: list[list[int]], count: int, sampling: Sampling, choosable: int, after_token=lambda: None
) -> list[list[int]]:
    """`count` ids of below `choosable` after each prompt, the same on every rank. Collective."""
    sizes = engine.groups.topology
    unit = 2 * sizes.cp * sizes.tp  # what a sequence's length is a multiple of
    length = -(-(max(map(len, prompts)) + count) // unit) * unit
    tokens = np.zeros((len(prompts), 1, length), dtype=np.int64)  # padded on the right, where a causal mask lets nobody look
    for row, prompt in zip(tokens, prompts):
        row[0, : len(prompt)] = prompt
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    for place in range(count):
        ends = [len(prompt) + place for prompt in prompts]
        for row, end, token in zip(tokens, ends, _next_tokens(engine, tokens, ends, sampling, choosable, generators)):
            row[0, end] = token
        after_token()
    engine.release_gathered_weights()
    return [row[0, len(prompt) : len(prompt) + count].tolist() for row, prompt in zip(tokens, prompts)]


def _next_tokens(engine: Engine, tokens: np.ndarray, ends: list[int], sampling: Sampling, choosable: int, generators: list) -> list[int]:
    at, cp = engine.groups.at, engine.groups.topology.cp
    mine = local_positions(tokens.shape[-1], cp, at.cp).tolist()
    chosen = torch.zeros(len(ends), dtype=torch.int64, device=engine.groups.device)

    def read(logits: Tensor, m: int) -> None:  # [s of this CP rank, 1, V/t]
        draw = torch.rand(1, generator=generators[m])  # by every rank of the last stage: the end of a text may lie on any of CP
        if ends[m] - 1 not in mine:
            return
        last = whole_vocabulary(logits[mine.index(ends[m] - 1)].unsqueeze(0), engine.config.model.vocab_size, engine.tp)[0]
        seed = torch.Generator().manual_seed(int(draw * 2**24))
        if at.tp == at.dp == 0:
            chosen[m] = choose(last[:, :choosable], sampling, seed)[0]

    positions = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape)
    zeros = np.zeros(tokens.shape, dtype=np.int32)
    engine.read_logits(Batch(tokens, tokens, np.zeros(tokens.shape, dtype=bool), zeros, positions), read)
    dist.all_reduce(chosen)  # one rank of the last stage has chosen, the others hold 0
    return chosen.tolist()
