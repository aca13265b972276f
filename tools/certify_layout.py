"""Checks the layout of a run on this machine before it is queued: give it the flags of the run.

    python tools/certify_layout.py --certificate out.md --model-name llama3-405b --tensor-model-parallel-size 8 --world-size 16384 ...

Exit status 0: passed, or passed in part (the certificate says what was not tried); 1: a number differs; 2: the flags are refused.
"""

import argparse
import sys
from pathlib import Path

from megatron_llama3.config.command_line import build_parser, parse_run_config
from megatron_llama3.config.errors import exit_on_user_error


def main() -> None:
    usage = "%(prog)s [--certificate FILE.md] [flags of the run]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true", help="Show this and the flags of the run, and exit.")
    parser.add_argument("--certificate", type=Path, default=Path("certificate.md"), metavar="FILE.md", help="Where to write it.")
    own, flags = parser.parse_known_args()
    if own.help:
        print(parser.format_help(), build_parser().format_help(), sep="\n", end="")
        return
    config = parse_run_config([*flags, "--dry-run"])
    from megatron_llama3.planning.certify import as_markdown, certify  # torch, which a refused command line need not wait for

    certificate = certify(config, progress=lambda text: print(text, flush=True))
    text = as_markdown(certificate, flags)
    own.certificate.write_text(text, encoding="utf-8")
    print(text)
    print(f"{certificate.verdict}: {own.certificate}")
    sys.exit(certificate.verdict == "FAILED")


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
