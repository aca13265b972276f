"""From a batch of the data stream to what this rank's model reads: its part of each sequence under context parallelism, on its device."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from megatron_llama3.data.loader import Batch
from megatron_llama3.model.attention import AttentionMask, to_device
from megatron_llama3.model.llama import ModelInputs
from megatron_llama3.parallel.context_parallel import chunk_ranges, local_positions
from megatron_llama3.parallel.groups import ParallelGroups


class Microbatch(NamedTuple):
    inputs: ModelInputs
    loss_mask: Tensor
    """bool [s, b]: which targets count"""


def make_microbatches(batch: Batch, groups: ParallelGroups, document_mask: bool = True) -> list[Microbatch]:
    """One `Microbatch` for each row of `batch`'s first axis; every array of the batch is [micro-batches, b, whole sequence]."""
    cp_size, cp_rank = groups.topology.cp, groups.at.cp
    seq_length = batch.tokens.shape[-1]
    mine = local_positions(seq_length, cp_size, cp_rank).numpy()

    def on_device(array: np.ndarray) -> Tensor:  # [b, whole sequence] -> [s, b], s of this CP rank
        return to_device(array[..., mine].T, groups.device)

    microbatches = []
    for m in range(len(batch.tokens)):
        ids, positions = batch.document_ids[m], batch.position_ids[m]
        # Where nothing has to be masked or told apart, kernels take a causal flag, and one row of positions serves all.
        one_document = not document_mask or bool((ids == ids[:, :1]).all())
        same_positions = bool((positions == positions[0]).all())
        mask = AttentionMask(chunk_ranges(seq_length, cp_size, cp_rank), None if one_document else ids, groups.device)
        inputs = ModelInputs(
            tokens=on_device(batch.tokens[m]),
            position_ids=on_device(positions[:1] if same_positions else positions),
            mask=mask,
            targets=on_device(batch.targets[m]),
        )
        microbatches.append(Microbatch(inputs, on_device(batch.loss_mask[m])))
    return microbatches
