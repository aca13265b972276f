"""A certificate for the layout of one run: the run's model made small, its layout kept, trained on gloo ranks of this machine and compared
with one process and with the plain reference, which shares no code with either. Where spmd-types is installed, the model of each trial is
typed by mesh axis too (mesh_types.py).
"""

import math
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec

from megatron_llama3.config.run import RunConfig
from megatron_llama3.planning.coverage import coverage
from megatron_llama3.planning.equivalence import BOUNDS, Trace, compare, one_process, train_reference, train_under
from megatron_llama3.planning.local_ranks import RankFailedError
from megatron_llama3.planning.trials import Trial, describe, make_trials

STEPS = 5
BF16_FACTORS = {"all_gradients": 2.0, "gradient": 2.0, "loss_rms": 5.5}
"""How many times the error of one bf16 process a layout's may be. Five losses are few: of two runs with the same error, one has twice the
other's root mean square in 8 of 100 pairs, 5.5 times in 1 of 1,000 (F distribution)."""


@dataclass
class Result:
    trial: Trial
    dtype: str
    values: dict[str, float]
    bounds: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(self.values[kind] <= bound for kind, bound in self.bounds.items())


@dataclass
class Certificate:
    config: RunConfig
    results: list[Result] = field(default_factory=list)
    exercised: list[str] = field(default_factory=list)
    not_exercised: list[str] = field(default_factory=list)
    type_errors: list[str] | None = None
    """of the trials' models; None where they were not typed"""

    @property
    def verdict(self) -> str:
        if self.type_errors or not all(result.passed for result in self.results):
            return "FAILED"
        return "PARTIAL" if self.not_exercised else "PASSED"


def certify(config: RunConfig, progress=lambda text: None) -> Certificate:
    """Runs every trial of `config`'s layout in full precision and, for a bf16 run, in bf16."""
    trials = make_trials(config)
    certificate = Certificate(config, [], *coverage(config, trials))
    if find_spec("spmd_types"):
        certificate.type_errors = [error for trial in trials for error in type_errors(trial)]
    exact = "fp32" if config.parallel.engine == "deepspeed" else "fp64"
    own = "bf16" if config.optimizer.bf16 else "fp64" if config.optimizer.fp64 else "fp32"
    for trial in trials:
        plain = train_reference(trial.config, STEPS)
        for dtype in dict.fromkeys((exact, own)):
            progress(f"{describe(trial)} in {dtype}")
            try:
                certificate.results.append(run_trial(trial, dtype, plain))
            except RankFailedError as error:
                progress(f"did not finish: {str(error).strip().splitlines()[-1]}")
                certificate.results.append(Result(trial, dtype, {"did not finish": math.inf}, {"did not finish": 0.0}))
    return certificate


def type_errors(trial: Trial) -> list[str]:
    """What of the trial's model does not type: nothing, or the first error and where it was found."""
    from megatron_llama3.planning.mesh_types import check_types  # spmd-types, which only tests and certificates use

    try:
        check_types(trial.config)
    except RankFailedError as error:
        return [f"{describe(trial)}: {next(line for line in str(error).splitlines() if 'Error: ' in line)}"]
    return []


def run_trial(trial: Trial, dtype: str, plain: Trace) -> Result:
    """`plain` is what the reference left."""
    config = deepcopy(trial.config)
    config.optimizer.fp64, config.optimizer.bf16 = dtype == "fp64", dtype == "bf16"
    alone = train_under(one_process(config), STEPS)
    found = train_under(config, STEPS)
    if dtype == "bf16":
        ours, theirs = vars(compare(found, plain)), vars(compare(alone, plain))
        return Result(trial, dtype, ours, {kind: times * theirs[kind] for kind, times in BF16_FACTORS.items()} | {"copies": 0.0})
    values, bounds = vars(compare(found, alone)), BOUNDS[dtype]
    against_plain = vars(compare(found, plain))
    values |= {f"{kind} against the reference": against_plain[kind] for kind in bounds if kind != "copies"}
    bounds = bounds | {f"{kind} against the reference": bound for kind, bound in bounds.items() if kind != "copies"}
    return Result(trial, dtype, values, bounds)


def _judged(value: float, bound: float) -> str:
    return "ok" if value <= bound else "BROKEN"


def _typed(certificate: Certificate) -> list[str]:
    if certificate.type_errors is None:
        return ["Measured only: with `pip install spmd-types==0.3.1` the sums of gradients over TP and CP are typed too."]
    if certificate.type_errors:
        return ["Does not type by mesh axis:", *(f"- {error}" for error in certificate.type_errors)]
    return ["Typed and measured: for any values, each gradient is summed over TP and CP where it must be and nowhere else."]


def as_markdown(certificate: Certificate, flags: list[str]) -> str:
    rows = [
        f"| {describe(r.trial)} | {r.dtype} | {kind} | {r.values[kind]:.1e} | {bound:.1e} | {_judged(r.values[kind], bound)} |"
        for r in certificate.results
        for kind, bound in r.bounds.items()
    ]
    lines = [
        f"# Layout certificate: {certificate.verdict}",
        "",
        f"Flags: `{' '.join(flags)}`",
        "",
        f"Each trial trains a small model for {STEPS} steps on forked gloo ranks and compares every number with one process",
        "and with a plain reference of training that shares no code with it.",
        "In bf16 the bound is twice the error of one bf16 process against the reference, and for the five losses 5.5 times.",
        "",
        "| trial | dtype | quantity | deviation | bound | |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *_typed(certificate),
        "",
        "Exercised:",
        *(f"- {text}" for text in certificate.exercised),
        "",
        "Not exercised:",
        *(f"- {text}" for text in certificate.not_exercised or ["nothing that these flags ask for"]),
        "",
        "Outside of any certificate: the true sizes, GPU kernels, NCCL and the network.",
    ]
    return "\n".join(lines) + "\n"
