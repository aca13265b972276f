"""Averages the weights of several native checkpoints into a new one.

    python tools/average_checkpoints.py --load runs/8b/iter_0001000 runs/8b/iter_0001100 runs/8b/iter_0001200 --save runs/8b-averaged
    python tools/average_checkpoints.py --load runs/8b/iter_* --save runs/8b-averaged --exponential-decay 0.9

Plain mean, or an exponential one in the order given (oldest first). Weights only: start from the result with --finetune.
"""

import argparse
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--load", required=True, type=Path, nargs="+", metavar="DIR", help="checkpoints, oldest first")
    parser.add_argument("--save", required=True, type=Path, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument("--exponential-decay", type=float, metavar="D", help="0 < D < 1: each checkpoint moves the mean by 1 - D")
    parser.add_argument("--no-verify", action="store_true", help="do not hold the checkpoints to their checksums first")
    arguments = parser.parse_args()
    if len(arguments.load) < 2:
        raise UserError("--load: name at least two checkpoints")
    if arguments.exponential_decay is not None and not 0 < arguments.exponential_decay < 1:
        raise UserError(f"--exponential-decay {arguments.exponential_decay}: must lie between 0 and 1")

    from megatron_llama3.checkpoint.average import average, averaging_weights
    from megatron_llama3.checkpoint.files.publish import publish_folder
    from megatron_llama3.checkpoint.native import check_files, open_native, write_native

    shares = averaging_weights(len(arguments.load), arguments.exponential_decay)
    source = average([open_native(path, checksums=False) for path in arguments.load], shares, [str(path) for path in arguments.load])
    for path in arguments.load if not arguments.no_verify else ():
        check_files(path)
    with publish_folder(arguments.save, source.nbytes()) as aside:
        write_native(source, aside)
    for path, share in zip(arguments.load, shares, strict=True):
        print(f"{share:.4f} x {path}")
    print(f"done: {arguments.save}")


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
