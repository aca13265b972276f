"""Bytes of a training step at the layouts of the paper's Table 4: the planner's timeline beside the project's own engine run under fake
tensors, one rank of each world in a process of its own. Needs no GPU.

    python benchmarks/step_memory.py [--rows 1 2 3] [FLAGS that come last and win]
"""

import argparse
import multiprocessing
import resource
import time

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.schedules import phases
from megatron_llama3.planning.dry_run import MeasuredStep, measure_rank, rank_of_stage
from megatron_llama3.planning.memory import peak_memory

GIB = 2**30
LAYOUT = """
    --dry-run --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 16 --num-layers-per-virtual-pipeline-stage 1
    --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --micro-batch-size 1 --bf16
    --recompute-granularity selective --recompute-modules layernorm
"""
ROWS = {
    1: "--model-name llama3-405b --world-size 8192 --seq-length 8192 --global-batch-size 2048",
    2: "--model-name llama3-405b --world-size 16384 --seq-length 8192 --global-batch-size 2048",
    3: "--model-name llama3.1-405b --world-size 16384 --context-parallel-size 16 --seq-length 131072 --global-batch-size 128",
}


def measure(config: RunConfig, stage: int) -> tuple[MeasuredStep, float, float]:
    """With its CPU seconds and GiB of resident memory."""
    start = time.process_time()
    step = measure_rank(config, phases(config)[-1], rank_of_stage(config, stage))
    return step, time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    arguments, flags = parser.parse_known_args()
    print("| row | stage | planned, GiB | in the | measured, GiB | in | difference | after the step | CPU s | resident GiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in arguments.rows:
        config = parse_run_config([*ROWS[row].split(), *LAYOUT.split(), *flags])
        planned = peak_memory(config, phases(config)[-1])
        with multiprocessing.get_context("fork").Pool(1) as process:
            step, seconds, resident = process.apply(measure, (config, planned.stage))
        print(
            f"| {row} | {planned.stage} | {planned.total / GIB:.2f} | {planned.moment} | {step.peak / GIB:.2f} | {step.moment} | "
            f"{(step.peak - planned.total) / GIB:+.2f} | {step.after / GIB:.2f} | {seconds:.0f} | {resident:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
