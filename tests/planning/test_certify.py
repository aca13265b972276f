"""Shrinking a run's layout for its certificate: what is kept, what is split into several trials, what is called PARTIAL."""

import pytest
import torch

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.model.sharding import WeightSpec
from megatron_llama3.planning import certify as module
from megatron_llama3.planning.certify import Certificate, Result, as_markdown, certify, make_trials, run_trial
from megatron_llama3.planning.equivalence import Trace, synthetic_batch
from megatron_llama3.planning.local_ranks import RankFailedError

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
    assert lengths(trial) == [0] + [1] * 14 + [0]
    assert trial.config.parallel.sequence_parallel
    assert trial.config.model.num_query_groups == 2, "one KV head a TP rank, as 8 of 8"
    assert trial.config.optimizer.bf16


def test_a_phase_of_the_ramp_with_few_micro_batches_takes_no_axis_from_the_others():
    last, first = make_trials(config(THE_405B.replace("--global-batch-size 2048", ""), "--step-batch-size-schedule", "0:1024 252M:2048"))
    assert last.axes == {"tp": 2, "cp": 1, "pp": 2, "dp": 2}
    assert (first.axes["pp"], first.microbatches) == (3, 2)


@pytest.fixture
def untrained(monkeypatch):
    """Trials are made but not run."""
    monkeypatch.setattr(module, "run_trial", lambda trial, dtype: Result(trial, dtype, {"loss": 0.0}, {"loss": 0.0}))
    monkeypatch.setattr(module, "type_errors", lambda trial: [])


def lengths(trial) -> list[int]:
    return [len(c.layers) for c in layers_of_chunks(trial.config.model, trial.config.parallel)]


@pytest.mark.usefixtures("untrained")
def test_four_axes_are_tried_by_threes_and_that_is_said():
    flags = THE_405B.replace("2048", "128") + " --context-parallel-size 16"
    trials = make_trials(config(flags))
    assert [sorted(a for a, n in t.axes.items() if n > 1) for t in trials] == [
        ["cp", "pp", "tp"], ["cp", "dp", "tp"], ["dp", "pp", "tp"], ["cp", "dp", "pp"]
    ]  # fmt: skip
    certificate = certify(config(flags))
    assert certificate.verdict == "PARTIAL"
    assert certificate.not_exercised[0] == "TP 2 x CP 2 x PP 2 x DP 2 together: 16 processes, where a trial has at most 8"
    assert "PARTIAL" in as_markdown(certificate, flags.split()).splitlines()[0]


@pytest.mark.usefixtures("untrained")
def test_axes_too_large_together_are_listed_with_their_product():
    flags = (
        "--model-name llama3-8b --world-size 256 --tensor-model-parallel-size 32 --pipeline-model-parallel-size 2 --context-parallel-size 2"
    )
    certificate = certify(config(flags))
    assert [sorted(a for a, n in r.trial.axes.items() if n > 1) for r in certificate.results[::2]] == [
        ["cp", "dp", "pp"], ["cp", "tp"], ["pp", "tp"], ["dp", "tp"]
    ]  # fmt: skip
    assert [text.split(",")[0] for text in certificate.not_exercised] == [
        "TP 4 x CP 2 x PP 2 together: 16 processes",
        "TP 4 x CP 2 x DP 2 together: 16 processes",
        "TP 4 x PP 2 x DP 2 together: 16 processes",
        "TP 4 x CP 2 x PP 2 x DP 2 together: 32 processes",
    ]


ACCOUNTED = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
EMPTY = "stages that hold only the embedding or only the output"


@pytest.mark.usefixtures("untrained")
def test_empty_stages_without_virtual_stages_stay_empty():
    run = config(f"--world-size 4 --pipeline-model-parallel-size 4 --num-layers 2 {ACCOUNTED}", "--global-batch-size", "8")
    (trial,) = make_trials(run)
    assert lengths(trial) == [0, 1, 0]
    certificate = certify(run)
    assert EMPTY in certificate.exercised
    assert certificate.verdict == "PASSED"


@pytest.mark.usefixtures("untrained")
def test_what_no_trial_has_is_not_called_exercised(monkeypatch):
    monkeypatch.setattr(module, "_small_pp", lambda config, microbatch_class: 2)
    run = config(f"--world-size 4 --pipeline-model-parallel-size 4 --num-layers 2 {ACCOUNTED}", "--global-batch-size", "3")
    certificate = certify(run)
    assert certificate.not_exercised == ["M < PP", EMPTY, "chunks of different length"]
    assert not set(certificate.not_exercised) & set(certificate.exercised)
    assert certificate.verdict == "PARTIAL"


def test_m_below_pp_stays_above_1():
    (trial,) = make_trials(config("--world-size 8 --pipeline-model-parallel-size 8 --num-layers 8 --global-batch-size 4"))
    assert (trial.axes["pp"], trial.microbatches) == (3, 2)


def test_the_last_of_two_ranks_stays_uneven():
    (trial,) = make_trials(config("--world-size 2 --pipeline-model-parallel-size 2 --num-layers 8 --decoder-last-pipeline-num-layers 3"))
    assert lengths(trial) == [2, 1]


@pytest.mark.parametrize(
    "flags",
    [
        "--lr 3e-4 --min-lr 2.5e-4 --lr-warmup-iters 100 --train-iters 200",
        f"--world-size 4 --pipeline-model-parallel-size 4 --num-layers 2 {ACCOUNTED} "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "--world-size 5 --tensor-model-parallel-size 5 --sequence-parallel --num-attention-heads 5 --num-query-groups 1 --hidden-size 40 "
        "--ffn-hidden-size 40 --seq-length 40",
    ],
)
def test_a_run_that_is_accepted_has_trials_that_are_accepted(flags):
    (trial,) = make_trials(config(flags))
    assert (trial.config.optimizer.min_lr, trial.config.optimizer.lr_warmup_iters) == (0, 0)


@pytest.mark.usefixtures("untrained")
def test_attention_kernels_are_tried_or_listed():
    auto = certify(config("--world-size 2 --bf16"))
    assert auto.not_exercised == ["--attention-kernel auto, which is varlen on a GPU in bf16 (tried: sdpa)"]
    assert certify(config("--world-size 2")).not_exercised == []
    assert certify(config("--world-size 2 --bf16 --attention-kernel sdpa")).not_exercised == []
    (trial,) = make_trials(config("--world-size 2 --attention-kernel reference"))
    assert trial.config.training.attention_kernel == "reference"


def test_loss_across_documents_is_tried():
    (trial,) = make_trials(config("--world-size 2 --loss-across-documents"))
    (within,) = make_trials(config("--world-size 2"))
    across, within = (synthetic_batch(t.config, 0, 0, 1) for t in (trial, within))
    assert (across.loss_mask & ~within.loss_mask).any()
    assert (across.document_ids == within.document_ids).all()
    assert "loss across documents" in module._features(trial.config)


def test_copies_that_differ_fail_in_bf16_too(monkeypatch):
    (trial,) = make_trials(config("--world-size 2 --bf16"))

    def trace(config, steps):
        return Trace([1.0], [1.0], {"w": torch.ones(2)}, {"w": torch.ones(2)}, copies=1e-3 * (config.parallel.world_size > 1))

    monkeypatch.setattr(module, "train_under", trace)
    result = run_trial(trial, "bf16")
    assert not result.passed
    assert result.values["copies"] > result.bounds["copies"] == 0


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
        assert lengths(trial) == [1, 2, 1, 1, 2, 1]
        assert trial.config.parallel.microbatch_group_size_per_vp_stage == 2


def test_a_broken_number_fails_and_an_infinite_one_too():
    (trial,) = make_trials(config("--world-size 2"))
    for value in (2e-10, float("inf")):
        certificate = Certificate(trial.config, [Result(trial, "fp64", {"loss": value}, {"loss": 1e-10})])
        assert certificate.verdict == "FAILED"
        assert "BROKEN" in as_markdown(certificate, [])


def test_a_trial_that_fails_leaves_the_others_their_place(monkeypatch):
    def fail(trial, dtype):
        raise RankFailedError("rank 0:\nRuntimeError: no memory")

    said = []
    monkeypatch.setattr(module, "run_trial", fail)
    certificate = certify(config("--world-size 2"), progress=said.append)
    assert said[1] == "did not finish: RuntimeError: no memory"
    assert certificate.verdict == "FAILED"
    assert "| did not finish | inf | 0.0e+00 | BROKEN |" in as_markdown(certificate, [])


@pytest.mark.usefixtures("untrained")
def test_what_does_not_type_fails_and_that_is_said(monkeypatch):
    run = config("--world-size 2 --tensor-model-parallel-size 2 --sequence-parallel --num-layers 2")
    assert "Typed and measured" in as_markdown(certify(run), [])
    monkeypatch.setattr(module, "type_errors", lambda trial: ["TP 2: SpmdTypeError: V and I"])
    certificate = certify(run)
    assert certificate.verdict == "FAILED"
    assert "- TP 2: SpmdTypeError: V and I" in as_markdown(certificate, [])
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    certificate = certify(run)
    assert certificate.verdict == "PASSED"
    assert "Measured only" in as_markdown(certificate, [])


def test_the_types_of_a_trial(monkeypatch):
    (trial,) = make_trials(config("--world-size 2 --tensor-model-parallel-size 2 --sequence-parallel --num-layers 2"))
    assert module.type_errors(trial) == []
    monkeypatch.setattr(WeightSpec, "gradient_is_partial", lambda spec, tp, sequence_parallel: False)
    (error,) = module.type_errors(trial)
    assert error.startswith("TP 2, M")
    assert "SpmdTypeError: Invariant type on axis" in error


@pytest.mark.slow
def test_a_real_layout_passes_and_a_planted_fault_fails(monkeypatch):
    from tests.planning.faults import FAULTS

    monkeypatch.setattr(module, "STEPS", 2)
    run = config("--world-size 2 --tensor-model-parallel-size 2 --sequence-parallel --num-layers 2")
    assert certify(run).verdict == "PASSED"
    original = module.train_under
    plant = FAULTS["norm gradients unsummed"].plant
    monkeypatch.setattr(module, "train_under", lambda c, steps: original(c, steps, before=plant))
    assert certify(run).verdict == "FAILED"
