"""Cached decoding against one full forward pass, batches against prompts alone, TP against one process, and transformers' generate."""

import pytest
import torch

from megatron_llama3.config.errors import UserError
from megatron_llama3.inference import engine as engine_module
from megatron_llama3.inference.engine import InferenceEngine
from megatron_llama3.inference.sampling import GREEDY, Sampling
from megatron_llama3.planning.local_ranks import run_ranks
from tests.inference.models import full_logits, loaded, on_one_rank, random_source

PROMPTS = [[5, 17, 3], [88, 1, 2, 3, 4, 5, 6, 7], [40]]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tied", [False, True])
@on_one_rank
def test_cached_logits_equal_the_full_forward(dtype, bound, tied):
    tokens = torch.randint(97, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    with loaded(random_source(untie_embeddings_and_output_weights=not tied), dtype) as model:
        engine, padding = InferenceEngine(model), torch.zeros(1, dtype=torch.int64)
        expected = full_logits(model, tokens)
        caches, got = engine.new_caches(20, 1), []
        with torch.no_grad():
            for start, end in ((0, 7), (7, 12), *((i, i + 1) for i in range(12, 20))):
                got.append(engine.forward(torch.tensor(tokens[start:end]).unsqueeze(1), start, padding, caches)[:, 0])
    error = (torch.cat(got) - expected).abs().max() / expected.abs().max()
    assert error < bound


@on_one_rank
def test_greedy_equals_the_argmax_of_full_forwards():
    with loaded(random_source()) as model:
        (completion,) = InferenceEngine(model).generate([PROMPTS[0]], 12, GREEDY)
        tokens = list(PROMPTS[0])
        for _ in range(12):
            tokens.append(full_logits(model, tokens)[-1].argmax().item())
    assert completion.token_ids == tokens[3:]
    assert not completion.stopped


@on_one_rank
def test_a_batch_equals_each_prompt_alone(monkeypatch):
    with loaded(random_source()) as model:
        engine = InferenceEngine(model)
        alone = [engine.generate([prompt], 15, GREEDY)[0] for prompt in PROMPTS]
        together = engine.generate(PROMPTS, 15, GREEDY)
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 9)  # three tokens a pass: the prompts take several
        in_pieces = engine.generate(PROMPTS, 15, GREEDY)
    assert alone == together == in_pieces
    assert len({tuple(completion.token_ids) for completion in alone}) == 3


@on_one_rank
def test_a_stop_id_ends_its_row_only():
    with loaded(random_source()) as model:
        engine = InferenceEngine(model)
        free = engine.generate(PROMPTS, 10, GREEDY)
        stop = free[0].token_ids[4]
        stopped = engine.generate(PROMPTS, 10, GREEDY, {stop})
    for before, after in zip(free, stopped, strict=True):
        expected = before.token_ids[: before.token_ids.index(stop)] if stop in before.token_ids else before.token_ids
        assert after.token_ids == expected
        assert after.stopped == (stop in before.token_ids)


@on_one_rank
def test_rows_without_a_token_are_never_chosen():
    with loaded(random_source()) as model:
        completions = InferenceEngine(model, vocab_size=50).generate(PROMPTS, 20, Sampling(5.0, 1.0))
    chosen = {token for completion in completions for token in completion.token_ids}
    assert max(chosen) < 50
    assert len(chosen) > 20


@on_one_rank
def test_a_prompt_without_room_is_refused():
    with loaded(random_source()) as model:
        engine = InferenceEngine(model)
        assert len(engine.generate([[1] * 54], 10, GREEDY)[0].token_ids) == 10
        with pytest.raises(UserError, match=r"prompt 2 has 55 tokens; with --max-new-tokens 10 .* 64"):
            engine.generate([[1], [1] * 55], 10, GREEDY)
        with pytest.raises(UserError, match="prompt 1 has no tokens"):
            engine.generate([[]], 10, GREEDY)


def _on_this_rank(source):
    with loaded(source) as model:
        engine = InferenceEngine(model)
        greedy = engine.generate(PROMPTS, 10, GREEDY)
        sampled = engine.generate(PROMPTS, 10, Sampling(1.0, 0.95, seed=7))
        tokens, caches = torch.tensor([PROMPTS[1]]).T, engine.new_caches(8, 1)
        with torch.no_grad():
            logits = engine.forward(tokens, 0, torch.zeros(1, dtype=torch.int64), caches)
        return greedy, sampled, logits.numpy()


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_tensor_parallel_equals_one_process(tp, tied):
    """97 entries are uneven over 2 and 4 ranks, and 2 KV heads are fewer than 4 ranks."""
    source = random_source(untie_embeddings_and_output_weights=not tied)
    ((greedy, sampled, logits),) = run_ranks(1, _on_this_rank, source)
    for result in run_ranks(tp, _on_this_rank, source):
        assert result[0] == greedy
        assert result[1] == sampled
        assert abs(result[2] - logits).max() < 1e-12
