"""Batches that are nasty on purpose, for comparing layouts."""

import numpy as np

from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import Batch, merge_batches


def synthetic_batch(config: RunConfig, step: int, dp_rank: int, dp_size: int) -> Batch:
    """This rank's part of a global batch that depends on (seed, step) alone: packed documents, targets that do not count at borders and
    at random, more of them the later the sequence, none at all in the last one, and every fourth step only those of the first, so that all
    DP ranks but one have nothing to learn from."""
    rng = np.random.default_rng([config.training.seed, step])
    g, b, s = config.training.global_batch_size, config.training.micro_batch_size, config.data.seq_length
    stream = rng.integers(0, config.model.vocab_size, (g, s + 1))
    begins = _document_begins(rng, step, g, s)
    document_ids = begins.cumsum(1).astype(np.int32)
    position_ids = np.broadcast_to(np.arange(s), (g, s))
    if config.data.reset_position_ids:
        position_ids = position_ids - np.maximum.accumulate(np.where(begins, position_ids, 0), axis=1)
    mask = rng.random((g, s)) > np.linspace(0, 0.7, g)[:, None]
    if not config.data.loss_across_documents:
        mask[:, :-1] &= ~begins[:, 1:]
    if g > 1:
        mask[1 if step % 4 == 1 else -1 :] = False
    arrays = Batch(
        tokens=stream[:, :-1],
        targets=stream[:, 1:],
        loss_mask=mask,
        document_ids=document_ids,
        position_ids=position_ids,
    )
    return merge_batches([arrays], lambda one: one[0].reshape(g // (b * dp_size), dp_size, b, s)[:, dp_rank])


def _document_begins(rng: np.random.Generator, step: int, g: int, s: int) -> np.ndarray:
    """bool [g, s], where a document begins after the first: anywhere, four a sequence; in every second sequence instead one before, one on
    and one after a border between the chunks of context parallelism, whose size is another one each time."""
    begins = rng.random((g, s)) < 4 / s
    sizes = [cp for cp in range(2, 9) if s % (2 * cp) == 0]
    for number in range(step % 2, g, 2):
        cp = sizes[(step + number // 2) % len(sizes)]
        borders = rng.permutation(np.arange(1, 2 * cp))[:3] * (s // (2 * cp))
        begins[number] = False
        begins[number, borders + (-1, 0, 1)] = True
    begins[:, 0] = False
    return begins
