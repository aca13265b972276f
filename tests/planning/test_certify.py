"""Shrinking a run's layout for its certificate: what is kept, what is split into several trials, what is called PARTIAL."""

import pytest

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.planning import certify as module
from megatron_llama3.planning.certify import Certificate, Result, as_markdown, certify, make_trials

THE_405B = (
    "--model-name llama3-405b --world-size 16384 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --sequence-parallel "
    "--num-virtual-stages-per-pipeline-rank 8 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --bf16 "
    "--global-batch-size 2048"
)


def config(flags: str, *more: str):
    return parse_run_config([*flags.split(), *more, "--dry-run"])


def test_the_405b_keeps_every_axis_its_chunks_and_its_empty_stages():
    (trial,) = make_trials(config(THE_405B))
    assert trial.axes == {"tp": 2, "cp": 1, "pp": 2, "dp": 2}
    chunks = [len(c.layers) for c in layers_of_chunks(trial.config.model, trial.config.parallel)]
    assert chunks == [0] + [1] * 14 + [0]
    assert trial.config.parallel.sequence_parallel
    assert trial.config.model.num_query_groups == 2, "one KV head a TP rank, as 8 of 8"
    assert trial.config.optimizer.bf16


def test_four_axes_are_tried_by_threes_and_that_is_said(monkeypatch):
    flags = THE_405B.replace("2048", "128") + " --context-parallel-size 16"
    trials = make_trials(config(flags))
    assert [sorted(a for a, n in t.axes.items() if n > 1) for t in trials] == [
        ["cp", "pp", "tp"], ["cp", "dp", "tp"], ["dp", "pp", "tp"], ["cp", "dp", "pp"]
    ]  # fmt: skip
    monkeypatch.setattr(module, "run_trial", lambda trial, dtype: Result(trial, dtype, {"loss": 0.0}, {"loss": 0.0}))
    certificate = certify(config(flags))
    assert certificate.verdict == "PARTIAL"
    assert "TP, CP, PP, DP at once" in certificate.not_exercised[0]
    assert "PARTIAL" in as_markdown(certificate, flags.split()).splitlines()[0]


def test_kv_heads_shared_by_ranks_stay_shared():
    (trial,) = make_trials(config("--model-name llama3-8b --world-size 32 --tensor-model-parallel-size 32 --global-batch-size 4"))
    assert trial.axes["tp"] == 4
    assert trial.config.model.num_query_groups == 1


def test_uneven_stages_n_and_the_batch_ramp():
    flags = "--num-layers 28 --world-size 8 --pipeline-model-parallel-size 8 --decoder-first-pipeline-num-layers 2 "
    flags += "--decoder-last-pipeline-num-layers 2 --num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-vp-stage 5"
    trials = make_trials(config(flags, "--step-batch-size-schedule", "0:4 1M:12"))
    assert [t.microbatches for t in trials] == [7, 2], "12 of 8 ranks: no multiple; 4: below PP"
    for trial in trials:
        assert [len(c.layers) for c in layers_of_chunks(trial.config.model, trial.config.parallel)] == [1, 2, 1, 1, 2, 1]
        assert trial.config.parallel.microbatch_group_size_per_vp_stage == 2


def test_a_broken_number_fails_and_an_infinite_one_too():
    (trial,) = make_trials(config("--world-size 2"))
    for value in (2e-10, float("inf")):
        certificate = Certificate(trial.config, [Result(trial, "fp64", {"loss": value}, {"loss": 1e-10})])
        assert certificate.verdict == "FAILED"
        assert "BROKEN" in as_markdown(certificate, [])


@pytest.mark.slow
def test_a_real_layout_passes_and_a_planted_fault_fails(monkeypatch):
    from megatron_llama3.planning.faults import FAULTS

    monkeypatch.setattr(module, "STEPS", 2)
    run = config("--world-size 2 --tensor-model-parallel-size 2 --sequence-parallel --num-layers 2")
    assert certify(run).verdict == "PASSED"
    original = module.train_under
    plant = FAULTS["norm gradients unsummed"].plant
    monkeypatch.setattr(module, "train_under", lambda c, steps: original(c, steps, before=plant))
    assert certify(run).verdict == "FAILED"
