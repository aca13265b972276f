"""How many of the ranks that are there a run can use: its flags say how many GPUs hold the model, and all others are data parallel.

    LARGEST=64 STEP=8 python -m megatron_llama3.planning.fit_world FLAGS...       scripts/pretrain.sbatch asks before each attempt

Prints the largest multiple of STEP up to LARGEST with which the flags are accepted, and a line that says what follows from it. Where there
is none, the refusal is that of LARGEST, as an error and with status 2.
"""

import os
import sys

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.errors import UserError, exit_on_user_error
from megatron_llama3.config.run import RunConfig


def largest_world(flags: list[str], largest: int, step: int) -> RunConfig:
    """The run's config at that world size. Raises UserError as parsing the flags at `largest` does where no size is accepted."""
    refusal: UserError | None = None
    for size in range(largest, 0, -step):
        try:
            return parse_run_config([*flags, "--dry-run", "--world-size", str(size)])
        except UserError as error:
            refusal = refusal or error
    raise refusal or UserError(f"{largest} ranks in steps of {step}: there is no rank")


def describe(config: RunConfig) -> str:
    p, t = config.parallel, config.training
    dp = p.data_parallel_size
    return f"DP {dp}, {t.global_batch_size // (t.micro_batch_size * dp)} micro-batches for a global batch of {t.global_batch_size}"


def main() -> None:
    flags = [flag for flag in sys.argv[1:] if flag != "--dry-run"]  # scripts/launch.sh starts one process for it
    config = largest_world(flags, int(os.environ["LARGEST"]), int(os.environ["STEP"]))
    print(config.parallel.world_size, describe(config), sep="\n")


if __name__ == "__main__":
    exit_on_user_error(main)
