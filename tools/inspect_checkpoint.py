"""Shows what a native checkpoint holds, checks it, and compares two.

    python tools/inspect_checkpoint.py runs/8b                      # iteration, config, every tensor with shape, dtype and bytes
    python tools/inspect_checkpoint.py runs/8b --verify             # reads every byte: missing parts, truncation, non-finite values
    python tools/inspect_checkpoint.py runs/8b --diff runs/8b-other # config fields and tensors that differ

Exit status 1 if --verify finds damage or --diff a difference.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_llama3.config.errors import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a save folder, or one iter_ folder in it")
    parser.add_argument("--verify", action="store_true", help="read every tensor")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with another checkpoint")
    arguments = parser.parse_args()

    from megatron_llama3.checkpoint.native import open_native_tensors, resolve_native

    folder = resolve_native(arguments.checkpoint)
    tensors = open_native_tensors(folder)
    if arguments.diff is not None:
        sys.exit(print_differences(folder, tensors, resolve_native(arguments.diff)))
    print_tree(folder, tensors)
    if arguments.verify:
        sys.exit(verify(tensors))


def print_tree(folder: Path, tensors: dict) -> None:
    state = json.loads((folder / "train_state.json").read_text())
    print(f"{folder}: iteration {state['iteration']:,}, {state['consumed_samples']:,} sequences, {state['consumed_tokens']:,} tokens")
    print((folder / "run_config.yaml").read_text())
    for name, tensor in sorted(tensors.items()):
        print(f"{name:60} {'x'.join(map(str, tensor.shape)):>16} {str(tensor.dtype).removeprefix('torch.'):>9} {tensor.nbytes:>16,}")
    total = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{len(tensors)} tensors, {total:,} bytes")


def verify(tensors: dict) -> bool:
    """Reads every block; whether anything is wrong. A part that is missing or cut is an error of the reader itself."""
    bad = [name for name, tensor in tensors.items() if not all(block.isfinite().all() for block in tensor.blocks())]
    for name in bad:
        print(f"{name}: holds values that are not finite")
    print("damaged" if bad else "whole: every tensor was read and is finite")
    return bool(bad)


def print_differences(folder: Path, tensors: dict, other_folder: Path) -> bool:
    """Whether anything differs."""
    from megatron_llama3.checkpoint.native import open_native_tensors

    others, found = open_native_tensors(other_folder), []
    ours, theirs = ((path / "run_config.yaml").read_text().splitlines() for path in (folder, other_folder))
    found += [f"config: {a.strip()} | {b.strip()}" for a, b in zip(ours, theirs, strict=False) if a != b]
    for name in sorted(tensors.keys() | others.keys()):
        if name not in others or name not in tensors:
            found.append(f"{name}: only in {folder if name in tensors else other_folder}")
            continue
        found += [f"{name}: {text}" for text in _difference(tensors[name], others[name])]
    print("\n".join(found) if found else "no difference")
    return bool(found)


def _difference(a, b) -> list[str]:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return [f"{a.dtype} {list(a.shape)} | {b.dtype} {list(b.shape)}"]
    count, largest = 0, 0.0
    for x, y in zip(a.blocks(), b.blocks(), strict=True):
        unequal = x.view(-1) != y.view(-1)
        if unequal.any():
            count += int(unequal.sum())
            largest = max(largest, (x.double() - y.double()).abs().max().item())
    return [f"{count:,} of {a.nbytes // a.dtype.itemsize:,} values differ, by up to {largest:.3g}"] if count else []


if __name__ == "__main__":
    exit_on_user_error(main)
