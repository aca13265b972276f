"""Continues prompts: a prefill pass over the prompts, then one token a pass, with the keys and values of all layers kept.

Prompts of several lengths make one batch, padded on the left; the padding is a document of its own in the attention mask, so that no
prompt sees it, and positions count from each prompt's first token. Under TP every rank runs the same calls.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_llama3.config.errors import UserError
from megatron_llama3.inference.kv_cache import KVCache
from megatron_llama3.inference.sampling import Sampling, choose
from megatron_llama3.model.attention import AttentionMask
from megatron_llama3.model.llama import Llama, ModelInputs
from megatron_llama3.parallel.collectives import all_gather_first_dim
from megatron_llama3.parallel.tensor_parallel import TensorParallel

PREFILL_TOKENS = 1024  # of one pass over all rows: a pass holds the logits of its tokens, 128,256 columns each


@dataclass
class Completion:
    """What followed one prompt. `stopped` tells whether a stop id ended it; that id is not among `token_ids`."""

    token_ids: list[int]
    stopped: bool


class InferenceEngine:
    """A whole model (no pipeline, no context parallelism). Ids from `vocab_size` on are rows without a token and never chosen."""

    def __init__(self, model: Llama, vocab_size: int | None = None):
        self.model, self.config, self.tp = model, model.config, model.tp
        self.vocab_size = min(vocab_size or self.config.vocab_size, self.config.vocab_size)
        self.device = model.frequencies.device

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop_ids: Collection[int] = ()
    ) -> list[Completion]:
        """At most `max_new_tokens` tokens after each prompt. Raises UserError for a prompt that is empty or leaves no room for them."""
        self._check(prompts, max_new_tokens)
        tokens, padding = self._left_padded(prompts)
        caches = self.new_caches(len(tokens) + max_new_tokens, len(prompts))
        generator = torch.Generator().manual_seed(sampling.seed)
        completions = [Completion([], False) for _ in prompts]
        logits = self._prefill(tokens, padding, caches)
        for past in range(len(tokens), len(tokens) + max_new_tokens):
            chosen = self._agree(choose(logits[:, : self.vocab_size], sampling, generator))
            for completion, token in zip(completions, chosen.tolist(), strict=True):
                completion.stopped |= token in stop_ids
                if not completion.stopped:
                    completion.token_ids.append(token)
            if all(completion.stopped for completion in completions) or past == len(tokens) + max_new_tokens - 1:
                break
            logits = self.forward(chosen.unsqueeze(0), past, padding, caches)[-1]
        return completions

    def new_caches(self, max_length: int, batch: int) -> dict[int, KVCache]:
        """An empty cache for each layer, by layer number, as `Llama.forward` takes them."""
        return {int(number): self._new_cache(max_length, batch) for number in self.model.layers}

    def _new_cache(self, max_length: int, batch: int) -> KVCache:
        heads = max(1, self.config.num_query_groups // self.tp.size)  # where TP exceeds them, a rank uses one
        dtype = self.model.options.compute_dtype
        return KVCache(max_length, batch, heads, self.config.head_dim, dtype, self.device)

    def forward(self, tokens: Tensor, past: int, padding: Tensor, caches: dict[int, KVCache]) -> Tensor:
        """tokens [n, b] that follow `past` others; padding int64 [b], the length of each row's padding -> logits [n, b, V]."""
        end = past + len(tokens)
        positions = torch.arange(past, end, device=self.device).unsqueeze(1) - padding
        documents = None
        if padding.any():
            documents = (np.arange(end) >= padding.cpu().numpy()[:, None]).astype(np.int32)
        mask = AttentionMask([(past, end)], documents, self.device)
        logits = self.model(None, ModelInputs(tokens, positions.clamp(min=0), mask), caches)
        return whole_vocabulary(logits, self.config.vocab_size, self.tp)

    def _prefill(self, tokens: Tensor, padding: Tensor, caches: dict[int, KVCache]) -> Tensor:
        """Logits [b, V] after the last token of the prompts, in passes of bounded size."""
        past, step = 0, max(1, PREFILL_TOKENS // tokens.shape[1])
        for piece in tokens.split(step):
            logits = self.forward(piece, past, padding, caches)[-1]
            past += len(piece)
        return logits

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(tokens int64 [longest, b], padding int64 [b])."""
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        padding = [longest - len(prompt) for prompt in prompts]
        return torch.tensor(rows, device=self.device).T.contiguous(), torch.tensor(padding, device=self.device)

    def _agree(self, chosen: Tensor) -> Tensor:
        """The choice of TP rank 0: ranks that differ by a rounding must not go different ways."""
        if self.tp.size > 1:
            dist.broadcast(chosen, group=self.tp.group, group_src=0)
        return chosen

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        room = self.config.max_position_embeddings
        for number, prompt in enumerate(prompts, 1):
            if not prompt:
                raise UserError(f"prompt {number} has no tokens")
            if len(prompt) + max_new_tokens > room:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens; with --max-new-tokens {max_new_tokens} that is more than the model's "
                    f"{room} (max_position_embeddings): shorten one"
                )


def whole_vocabulary(logits: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """[n, b, V/t] -> [n, b, V] on every TP rank; the last ranks may hold fewer columns."""
    if tp.size == 1:
        return logits
    share = -(-vocab_size // tp.size)
    padded = F.pad(logits, (0, share - logits.shape[-1]))
    return all_gather_first_dim(padded.movedim(-1, 0), tp.group)[:vocab_size].movedim(0, -1)
