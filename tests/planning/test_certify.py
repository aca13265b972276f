"""Shrinking a run's layout for its certificate: what is kept, what is split into several trials, what is called PARTIAL."""

import math

import numpy as np
import pytest
import torch

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.model.sharding import WeightSpec
from megatron_llama3.parallel import context_parallel
from megatron_llama3.planning import certify as module
from megatron_llama3.planning import trials as trials_module
from megatron_llama3.planning.certify import Certificate, Result, as_markdown, certify, run_trial
from megatron_llama3.planning.coverage import features_of
from megatron_llama3.planning.equivalence import Trace
from megatron_llama3.planning.local_ranks import RankFailedError
from megatron_llama3.planning.synthetic_batch import synthetic_batch
from megatron_llama3.planning.trials import make_trials
from tests.planning.faults import FAULTS, patch
from tests.training.step_faults import STEP_FAULTS

THE_405B = (
    "--model-name llama3-405b --world-size 16384 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --sequence-parallel "
    "--num-virtual-stages-per-pipeline-rank 8 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --bf16 "
    "--global-batch-size 2048"
)


def config(flags: str, *more: str):
    return parse_run_config([*flags.split(), *more, "--dry-run"])


def test_the_405b_keeps_every_axis_its_chunks_and_its_empty_stages():
    trial, whole_tp = make_trials(config(THE_405B))
    assert trial.axes == {"tp": 2, "cp": 1, "pp": 2, "dp": 2}
    assert whole_tp.axes == {"tp": 8, "cp": 1, "pp": 1, "dp": 1}
    assert lengths(trial) == [0] + [1] * 14 + [0]
    assert trial.config.parallel.sequence_parallel
    assert trial.config.model.num_query_groups == 2, "one KV head a TP rank, as 8 of 8"
    assert trial.config.optimizer.bf16


def test_a_phase_of_the_ramp_with_few_micro_batches_takes_no_axis_from_the_others():
    last, _, first = make_trials(config(THE_405B.replace("--global-batch-size 2048", ""), "--step-batch-size-schedule", "0:1024 252M:2048"))
    assert last.axes == {"tp": 2, "cp": 1, "pp": 2, "dp": 2}
    assert (first.axes["pp"], first.microbatches) == (3, 2)


@pytest.fixture
def untrained(monkeypatch):
    """Trials are made but not run."""
    monkeypatch.setattr(module, "train_reference", lambda config, steps: None)
    monkeypatch.setattr(module, "run_trial", lambda trial, dtype, plain: Result(trial, dtype, {"loss": 0.0}, {"loss": 0.0}))
    monkeypatch.setattr(module, "type_errors", lambda trial: [])


def lengths(trial) -> list[int]:
    return [len(c.layers) for c in layers_of_chunks(trial.config.model, trial.config.parallel)]


@pytest.mark.usefixtures("untrained")
def test_four_axes_are_tried_by_threes_and_that_is_said():
    flags = THE_405B.replace("2048", "128") + " --context-parallel-size 16"
    trials = make_trials(config(flags))
    assert [sorted(a for a, n in t.axes.items() if n > 1) for t in trials] == [
        ["cp", "pp", "tp"], ["cp", "dp", "tp"], ["dp", "pp", "tp"], ["cp", "dp", "pp"], ["tp"], ["dp"]
    ]  # fmt: skip
    certificate = certify(config(flags))
    assert certificate.verdict == "PARTIAL"
    assert certificate.not_exercised[:3] == [
        "CP 16 (tried: 2)",
        "PP 16 (tried: 2)",
        "TP 8 x CP 2 x PP 2 x DP 8 together: 256 processes, where a trial has at most 8",
    ]
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
        "TP 32 (tried: 4)",
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
    assert lengths(trial) == [0, 1, 1, 0]
    certificate = certify(run)
    assert EMPTY in certificate.exercised
    assert certificate.verdict == "PASSED"


@pytest.mark.usefixtures("untrained")
def test_what_no_trial_has_is_not_called_exercised(monkeypatch):
    monkeypatch.setattr(trials_module, "_small_pp", lambda config, microbatch_class: 2)
    run = config(f"--world-size 16 --pipeline-model-parallel-size 16 --num-layers 14 {ACCOUNTED}", "--global-batch-size", "3")
    certificate = certify(run)
    assert certificate.not_exercised == ["PP 16 (tried: 2)", "M < PP", EMPTY, "chunks of different length"]
    assert not set(certificate.not_exercised) & set(certificate.exercised)
    assert certificate.verdict == "PARTIAL"


def test_m_below_pp_stays_above_1():
    for stages, expected in ((16, (3, 2)), (8, (8, 7))):
        size = f"--world-size {stages} --pipeline-model-parallel-size {stages} --num-layers {stages}"
        (trial,) = make_trials(config(f"{size} --global-batch-size 4"))
        assert (trial.axes["pp"], trial.microbatches) == expected


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
    assert "loss across documents" in features_of(trial.config)


def test_copies_that_differ_fail_in_bf16_too(monkeypatch):
    (trial,) = make_trials(config("--world-size 2 --bf16"))

    def trace(config, steps):
        return Trace([1.0], [1.0], {"w": torch.ones(2)}, {"w": torch.ones(2)}, copies=1e-3 * (config.parallel.world_size > 1))

    monkeypatch.setattr(module, "train_under", trace)
    result = run_trial(trial, "bf16", trace(trial.config, 1))
    assert not result.passed
    assert result.values["copies"] > result.bounds["copies"] == 0


def test_what_the_model_is_stays():
    (trial,) = make_trials(config("--world-size 2 --qk-layernorm --use-rope-scaling --rope-scaling-low-freq-factor 2 --norm-epsilon 1e-3"))
    model = trial.config.model
    assert (model.qk_layernorm, model.rope_scaling_low_freq_factor, model.norm_epsilon) == (True, 2, 1e-3)
    assert "norms of queries and keys" in features_of(trial.config)


def test_kv_heads_shared_by_ranks_stay_shared():
    (trial,) = make_trials(config("--model-name llama3-8b --world-size 32 --tensor-model-parallel-size 32 --global-batch-size 4"))
    assert trial.axes["tp"] == 4
    assert trial.config.model.num_query_groups == 1


def test_uneven_stages_n_and_the_batch_ramp():
    flags = "--num-layers 60 --world-size 16 --pipeline-model-parallel-size 16 --decoder-first-pipeline-num-layers 2 "
    flags += "--decoder-last-pipeline-num-layers 2 --num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-vp-stage 5"
    trials = make_trials(config(flags, "--step-batch-size-schedule", "0:4 1M:20"))
    assert [t.microbatches for t in trials] == [7, 2], "20 over 16 ranks: no multiple; 4: below PP"
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
    def fail(trial, dtype, plain):
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
    assert "SpmdTypeError: " in error


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--context-parallel-size 4", [(1, 4, 1, 1)]),
        ("--context-parallel-size 4 --pipeline-model-parallel-size 2", [(1, 4, 2, 1)]),
        ("--context-parallel-size 4 --tensor-model-parallel-size 4", [(4, 2, 1, 1), (2, 4, 1, 1)]),
        ("--context-parallel-size 4 --world-size 8", [(1, 4, 1, 2)]),
        ("--context-parallel-size 3 --pipeline-model-parallel-size 4 --seq-length 1008", [(1, 3, 2, 1), (1, 2, 4, 1)]),
        ("--tensor-model-parallel-size 8 --num-query-groups 8 --pipeline-model-parallel-size 16", [(2, 1, 2, 1), (8, 1, 1, 1)]),
    ],
)
def test_an_axis_that_fits_is_not_shrunk(flags, expected):
    """Sizes of TP, CP, PP and DP; each that fits on 8 processes is there whole."""
    sizes = [int(n) for n in flags.split() if n.isdigit() and int(n) < 100]
    world = "" if "world" in flags else f" --world-size {math.prod(sizes) // (8 if 'groups' in flags else 1)}"
    run = config(f"--num-layers 16 {flags}{world} --global-batch-size 16")
    assert [tuple(t.axes.values()) for t in make_trials(run)] == expected


@pytest.mark.usefixtures("untrained")
def test_a_shrunk_axis_makes_it_partial():
    whole = certify(config("--world-size 8 --tensor-model-parallel-size 4 --global-batch-size 2"))
    assert whole.exercised[:2] == ["TP 4", "DP 2"]
    assert whole.verdict == "PASSED"
    shrunk = certify(config("--world-size 48 --tensor-model-parallel-size 4 --global-batch-size 12"))
    assert shrunk.not_exercised == ["DP 12 (tried: 2)"]
    assert shrunk.verdict == "PARTIAL"
    apart = certify(config("--world-size 16 --tensor-model-parallel-size 4 --global-batch-size 4"))
    assert [tuple(r.trial.axes.values()) for r in apart.results[::2]] == [(4, 1, 1, 2), (2, 1, 1, 4)]
    assert apart.not_exercised == ["TP 4 x DP 4 together: 16 processes, where a trial has at most 8"]


@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize(("sequences", "steps"), [(6, 2), (1, module.STEPS), (4, module.STEPS)])
def test_documents_begin_on_before_and_after_the_borders_of_chunks(cp, sequences, steps):
    """The matrix's batches and those of certificates, small and large."""
    run = config(f"--seq-length 48 --global-batch-size {sequences}")
    found = set()
    for step in range(steps):
        ids = synthetic_batch(run, step, 0, 1).document_ids.reshape(sequences, 48)
        begins = np.nonzero(np.diff(ids))[1] + 1
        found |= {shift for shift in (-1, 0, 1) for at in begins if (at - shift) % (48 // (2 * cp)) == 0}
    assert found == {-1, 0, 1}


@pytest.mark.slow
def test_a_fault_from_cp_4_on_fails_a_run_of_cp_4(monkeypatch):
    """At CP 2 it changes nothing, and so a certificate that shrank CP passed it."""

    def plant():
        patch(context_parallel, "_order", lambda original, size, *args, **kw: original(size, *args, **kw).roll(int(size >= 4)))

    monkeypatch.setattr(module, "STEPS", 2)
    run = config("--world-size 4 --context-parallel-size 4 --num-layers 2")
    assert certify(run).verdict == "PASSED"
    original = module.train_under
    monkeypatch.setattr(module, "train_under", lambda c, steps: original(c, steps, before=plant))
    assert certify(run).verdict == "FAILED"


@pytest.mark.slow
def test_a_fault_that_one_process_has_too_shows_against_the_reference(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    original = module.train_under
    plant = STEP_FAULTS["loss and gradients halved"]
    monkeypatch.setattr(module, "train_under", lambda c, steps: original(c, steps, before=plant))
    certificate = certify(config("--world-size 2 --num-layers 2"))
    assert certificate.verdict == "FAILED"
    for result in certificate.results:
        broken = {kind for kind, bound in result.bounds.items() if result.values[kind] > bound}
        assert broken
        assert all("reference" in kind for kind in broken)


@pytest.mark.slow
def test_a_real_layout_passes_and_a_planted_fault_fails(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    run = config("--world-size 2 --tensor-model-parallel-size 2 --sequence-parallel --num-layers 2")
    assert certify(run).verdict == "PASSED"
    original = module.train_under
    plant = FAULTS["norm gradients unsummed"].plant
    monkeypatch.setattr(module, "train_under", lambda c, steps: original(c, steps, before=plant))
    assert certify(run).verdict == "FAILED"
