"""Layers to chunks: the paper's 405B split, and megatron-core's own split for every shape that both accept."""

import itertools

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig, layers_of_chunks
from megatron_llama3.config.presets import preset


def split(layers: int, stages: int, chunks: int = 1, **other):
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, num_virtual_stages_per_pipeline_rank=chunks, **other)
    return layers_of_chunks(ModelConfig(num_layers=layers), parallel)


def test_405b_first_chunk_only_embeds_and_last_only_predicts():
    both = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    parallel = ParallelConfig(pipeline_model_parallel_size=16, num_virtual_stages_per_pipeline_rank=8, **both)
    chunks = layers_of_chunks(preset("llama3-405b"), parallel)
    assert len(chunks) == 128
    assert chunks[0] == ([], True, False)
    assert chunks[-1] == ([], False, True)
    assert [c.layers for c in chunks[1:-1]] == [[i] for i in range(126)]


def test_one_rank_holds_everything():
    assert split(3, 1) == [([0, 1, 2], True, True)]


def test_uneven_rank_spreads_its_layers_over_its_chunks():
    chunks = split(10, 3, 2, decoder_first_pipeline_num_layers=2, decoder_last_pipeline_num_layers=4)
    assert [c.layers for c in chunks] == [[0], [1, 2], [3, 4], [5], [6, 7], [8, 9]]


def test_middle_chunk_without_layers_is_refused():
    with pytest.raises(UserError, match="chunk 1 of 3"):
        split(2, 3, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=1)


def _megatron_split(config, stages: int, chunks: int | None) -> list[int]:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    return [get_num_layers_to_build(config, v, p) for v in range(chunks or 1) for p in range(stages)]


@pytest.mark.slow
def test_same_split_as_megatron_core():
    """Every small shape: both refuse it, or both give each chunk the same number of layers (ours also refuses empty middle chunks)."""
    pytest.importorskip("megatron.core")
    from types import SimpleNamespace

    agreed = 0
    shapes = itertools.product(range(1, 13), (2, 3, 4), (1, 2, 3), (None, 1, 2, 4), (None, 1, 2, 4), (False, True), (False, True))
    for layers, stages, chunks, first, last, embedding, loss in shapes:
        if (first or last) and (embedding or loss):
            continue
        theirs = SimpleNamespace(
            pipeline_model_parallel_layout=None,
            num_layers=layers,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
            account_for_embedding_in_pipeline_split=embedding,
            account_for_loss_in_pipeline_split=loss,
        )
        try:
            counts = _megatron_split(theirs, stages, chunks if chunks > 1 else None)
        except AssertionError:
            counts = None
        if counts is not None and (sum(counts) != layers or min(counts) < 0 or 0 in counts[1:-1]):
            counts = None
        try:
            ours = split(
                layers,
                stages,
                chunks,
                decoder_first_pipeline_num_layers=first,
                decoder_last_pipeline_num_layers=last,
                account_for_embedding_in_pipeline_split=embedding,
                account_for_loss_in_pipeline_split=loss,
            )
            ours_counts = [len(c.layers) for c in ours]
        except UserError:
            ours_counts = None
        assert ours_counts == counts, theirs
        agreed += counts is not None
    assert agreed > 100
