"""The paper's ramps: which batch and length a step has, and how many tokens n steps consume."""

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import Phase, iterations_of, parse_schedule, parse_token_count, phase_at, phases, tokens_after

M, T = 10**6, 10**12


@pytest.fixture
def paper() -> RunConfig:
    config = RunConfig()
    config.training.step_batch_size_schedule = "0:1024 252M:1024 2.87T:2048"
    config.data.seq_length_schedule = "0:4096 252M:8192"
    return config


def test_paper_ramp(paper):
    assert phases(paper) == [Phase(0, 1024, 4096), Phase(252 * M, 1024, 8192), Phase(287 * 10**10, 2048, 8192)]
    assert [p.tokens_per_step for p in phases(paper)] == [4_194_304, 8_388_608, 16_777_216]
    assert phase_at(paper, 0) == phase_at(paper, 252 * M - 1) == (1024, 4096)
    assert phase_at(paper, 252 * M) == (1024, 8192)
    assert phase_at(paper, 16 * T) == (2048, 8192)


def test_tokens_after_equals_a_walk_over_every_step(paper):
    paper.training.step_batch_size_schedule = "0:8 10K:16 50K:24 51K:32"
    paper.data.seq_length_schedule = "0:100 9999:200 60K:400"
    consumed = 0
    for iteration in range(200):
        assert tokens_after(paper, iteration) == consumed
        batch, length = phase_at(paper, consumed)
        consumed += batch * length


def test_iterations_of_samples_equal_a_walk_over_every_step(paper):
    paper.training.step_batch_size_schedule = "0:8 10K:16 50K:24 51K:32"
    paper.data.seq_length_schedule = "0:100 9999:200 60K:400"
    samples, consumed = 0, 0
    for iteration in range(1, 100):
        batch, length = phase_at(paper, consumed)
        samples, consumed = samples + batch, consumed + batch * length
        assert iterations_of(paper, samples) == iteration
        assert iterations_of(paper, samples - 1) == iteration - 1


def test_paper_totals(paper):
    assert tokens_after(paper, 60) < 252 * M <= tokens_after(paper, 61)
    assert tokens_after(paper, 1_100_000) == pytest.approx(15.6 * T, rel=2e-3)  # the paper trains on 15.6T


def test_without_schedule_one_phase():
    config = RunConfig()
    config.training.global_batch_size, config.data.seq_length = 6, 10
    assert phases(config) == [Phase(0, 6, 10)]
    assert tokens_after(config, 7) == 420


@pytest.mark.parametrize(("text", "count"), [("0", 0), ("252M", 252 * M), ("2.87T", 287 * 10**10), ("1.5k", 1500), ("0.1B", 10**8)])
def test_token_counts(text, count):
    assert parse_token_count(text) == count


@pytest.mark.parametrize("text", ["", "5:1", "0:1 5", "0:1 x:2", "0:1 5:1.5", "0:1 0:2", "0:-1", "0:1 -5:2", "0:1 0.5:2", "0:1 1/0:2"])
def test_malformed(text):
    with pytest.raises(UserError, match="--a-flag"):
        parse_schedule(text, "--a-flag")
