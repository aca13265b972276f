"""Of the ranks that are there, as many as the flags can be spread over."""

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.planning.fit_world import describe, largest_world, main

FLAGS = [
    *("--num-layers", "4", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    *("--global-batch-size", "24", "--data-path", "x"),
]


@pytest.mark.parametrize(
    "largest, step, world, dp, microbatches",
    [(32, 4, 32, 8, 3), (28, 4, 24, 6, 4), (20, 4, 16, 4, 6), (8, 8, 8, 2, 12), (22, 2, 16, 4, 6), (4, 4, 4, 1, 24)],
)
def test_the_global_batch_stays_and_micro_batches_grow(largest, step, world, dp, microbatches):
    config = largest_world(FLAGS, largest, step)
    assert (config.parallel.world_size, config.parallel.data_parallel_size, config.training.global_batch_size) == (world, dp, 24)
    assert describe(config) == f"DP {dp}, {microbatches} micro-batches for a global batch of 24"


def test_too_few_ranks_are_refused_as_the_run_itself_would_refuse_them():
    with pytest.raises(UserError, match=r"^world size 3 is not divisible by TP x PP x CP = 2 x 2 x 1 = 4$"):
        largest_world(FLAGS, 3, 1)


def test_a_wrong_flag_is_what_is_said():
    with pytest.raises(UserError, match="--lrr"):
        largest_world([*FLAGS, "--lrr", "1"], 8, 4)


def test_a_script_reads_two_lines(monkeypatch, capsys):
    monkeypatch.setenv("LARGEST", "20")
    monkeypatch.setenv("STEP", "4")
    monkeypatch.setattr("sys.argv", ["fit_world", *FLAGS, "--dry-run"])
    main()
    assert capsys.readouterr().out == "16\nDP 4, 6 micro-batches for a global batch of 24\n"
