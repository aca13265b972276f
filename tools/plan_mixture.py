"""Weights for --data-path that give a mix of domains, from the sizes of their indexed datasets.

    python tools/plan_mixture.py --domain general=data/general --domain reasoning=data/maths data/stem --domain code=data/code \\
        --domain multilingual=data/de data/ja --target general=50 reasoning=25 code=17 multilingual=8 --train-tokens 1e9

prints each domain's tokens and how often the run reads them, warns where that is more than --max-epochs, and prints (or writes to --output)
WEIGHT PREFIX pairs. Datasets of one domain share its weight by their tokens. The default target is the paper's mix.
"""

import argparse
import sys
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--domain", nargs="+", action="append", required=True, metavar="NAME=PREFIX", help="a domain and its datasets")
    parser.add_argument("--target", nargs="+", metavar="NAME=SHARE", help="default: general=50 reasoning=25 code=17 multilingual=8")
    parser.add_argument("--train-tokens", type=float, help="length of the run; default: what the scarcest domain allows")
    parser.add_argument("--max-epochs", type=float, default=4.0, help="how often data may be read before it counts as short")
    parser.add_argument("--output", metavar="PATH", help="a file for the pairs, one a line")
    return parser.parse_args(arguments)


def main() -> None:
    flags = parse_arguments()
    from megatron_llama3.curation.blocks.mixture import PAPER_MIX, plan_mixture
    from megatron_llama3.tokenizer.vocabulary_files import write_whole

    sizes = {name: {prefix: count_tokens(prefix) for prefix in prefixes} for name, prefixes in map(parse_domain, flags.domain)}
    target = parse_target(flags.target) if flags.target else PAPER_MIX
    total = int(flags.train_tokens) if flags.train_tokens else None
    plans, shortages = plan_mixture({name: sum(datasets.values()) for name, datasets in sizes.items()}, target, total, flags.max_epochs)
    for name, plan in plans.items():
        print(
            f"{name:<16} {plan.tokens:>18,} tokens  {plan.wanted:>18,} wanted  {plan.wanted / max(1, plan.tokens):8.3f} epochs",
            file=sys.stderr,
        )
    for line in shortages:
        print(f"short: {line}", file=sys.stderr)
    shares = {name: target[name] / sum(target.values()) for name in sizes}
    pairs = [
        (shares[n] * size / sum(sizes[n].values()), prefix) for n in sizes for prefix, size in sizes[n].items() if shares[n] * size > 0
    ]
    lines = [f"{weight:.8g} {prefix}" for weight, prefix in pairs]
    if flags.output:
        write_whole(Path(flags.output), ("\n".join(lines) + "\n").encode())
    print(" ".join(lines))


def parse_domain(entries: list[str]) -> tuple[str, list[str]]:
    name, separator, first = entries[0].partition("=")
    if not separator or not name or not first:
        raise UserError(f"--domain {' '.join(entries)}: give NAME=PREFIX, then more prefixes if there are any")
    return name, [first, *entries[1:]]


def parse_target(entries: list[str]) -> dict[str, float]:
    try:
        return {name: float(share) for name, share in (entry.split("=") for entry in entries)}
    except ValueError:
        raise UserError(f"--target {' '.join(entries)}: give NAME=SHARE for each domain, such as general=50") from None


def count_tokens(prefix: str) -> int:
    from megatron_llama3.data.indexed_dataset import IndexedDataset

    return IndexedDataset(prefix).num_tokens


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
