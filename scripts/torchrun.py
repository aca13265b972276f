"""torchrun, but a run that fails shows the failing rank's own line alone, and ends with that rank's exit status.

    python scripts/torchrun.py --standalone --nproc-per-node 8 -m megatron_llama3.recipes.pretrain ...      (torchrun's flags)

torchrun itself adds its report and a traceback of its own, and always ends with 1; megatron_llama3/training/failures.py says what the
statuses mean.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

REFUSED, FAULT = 2, 1


def main() -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(None))
    except ChildFailedError as error:
        return status_of(list(error.failures.values()))
    except SignalException as error:
        return 128 + error.sigval
    return 0


def status_of(failures: list[ProcessFailure]) -> int:
    """That of a rank that knows what is wrong, before those of ranks that lost it or that torchrun ended."""
    for status in (REFUSED, FAULT):
        if any(failure.exitcode == status for failure in failures):
            return status
    first = min(failures, key=lambda failure: failure.timestamp)
    if first.exitcode < 0:
        print(f"error: local rank {first.local_rank} was killed by signal {-first.exitcode}", file=sys.stderr)
        return 128 - first.exitcode
    return first.exitcode


if __name__ == "__main__":
    sys.exit(main())
