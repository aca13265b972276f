"""Shows what a native checkpoint holds, checks it, and compares two.

    python tools/inspect_checkpoint.py runs/8b                      # iteration, config, every tensor with shape, dtype and bytes
    python tools/inspect_checkpoint.py runs/8b --verify             # reads every byte: missing files, truncation, flipped bits, NaN
    python tools/inspect_checkpoint.py runs/8b --diff runs/8b-other # config fields and tensors that differ, and by how much

Exit status 1 if --verify finds damage or --diff a difference.
"""

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_llama3.config.errors import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a save folder, or one iter_ folder in it")
    parser.add_argument("--verify", action="store_true", help="read every tensor")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with another checkpoint")
    arguments = parser.parse_args()

    from megatron_llama3.checkpoint.native import open_native_tensors
    from megatron_llama3.checkpoint.native.folder import resolve_native

    folder = resolve_native(arguments.checkpoint)
    if arguments.verify and print_damage(folder):
        sys.exit(1)
    tensors = open_native_tensors(folder)
    if arguments.diff is not None:
        sys.exit(print_differences(folder, tensors, resolve_native(arguments.diff)))
    print_tree(folder, tensors)
    if arguments.verify:
        sys.exit(verify(tensors))


def print_damage(folder: Path) -> bool:
    """Holds every file to the manifest; whether anything is wrong."""
    from megatron_llama3.checkpoint.native.manifest import damage, damaged_files, read_manifest

    found = list(damaged_files(folder)) or [reason for reason in [damage(folder)] if reason]
    for line in found:
        print(line)
    if not found and read_manifest(folder) is None:
        print("no manifest.json: without its checksums only sizes and values are checked")
    return bool(found)


def print_tree(folder: Path, tensors: dict) -> None:
    from megatron_llama3.checkpoint.native.folder import read_train_state

    state = read_train_state(folder)
    print(f"{folder}: iteration {state['iteration']:,}, {state['consumed_samples']:,} sequences, {state['consumed_tokens']:,} tokens")
    print((folder / "run_config.yaml").read_text())
    for name, tensor in sorted(tensors.items()):
        print(f"{name:60} {'x'.join(map(str, tensor.shape)):>16} {str(tensor.dtype).removeprefix('torch.'):>9} {tensor.nbytes:>16,}")
    total = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{len(tensors)} tensors, {total:,} bytes")


def verify(tensors: dict) -> bool:
    """Reads every value; whether any is not finite."""
    bad = [name for name, tensor in tensors.items() if not all(block.isfinite().all() for block in tensor.blocks())]
    for name in bad:
        print(f"{name}: holds values that are not finite")
    print("damaged" if bad else "whole: every tensor was read and is finite")
    return bool(bad)


def print_differences(folder: Path, tensors: dict, other_folder: Path) -> bool:
    """Whether anything differs."""
    from megatron_llama3.checkpoint.native import open_native_tensors

    others, found = open_native_tensors(other_folder), []
    found += config_differences(folder, other_folder)
    for name in sorted(tensors.keys() | others.keys()):
        if name not in others or name not in tensors:
            found.append(f"{name}: only in {folder if name in tensors else other_folder}")
            continue
        found += [f"{name}: {text}" for text in _difference(tensors[name], others[name])]
    print("\n".join(found) if found else "no difference")
    return bool(found)


def config_differences(folder: Path, other_folder: Path) -> list[str]:
    from megatron_llama3.config.command_line import load_run_config

    ours, theirs = (asdict(load_run_config(str(path / "run_config.yaml"))) for path in (folder, other_folder))
    groups = [group for group in ours if isinstance(ours[group], dict)]
    pairs = [(f"{group}.{name}", ours[group][name], theirs[group][name]) for group in groups for name in ours[group]]
    return [f"{name}: {a} | {b}" for name, a, b in pairs if a != b]


def _difference(a, b) -> list[str]:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return [f"{a.dtype} {list(a.shape)} | {b.dtype} {list(b.shape)}"]
    count, largest, apart, size = 0, 0.0, 0.0, 0.0
    for x, y in zip(a.blocks(), b.blocks(), strict=True):
        x, y = x.double(), y.double()
        unequal = (x != y) & ~(x.isnan() & y.isnan())
        if unequal.any():
            count += int(unequal.sum())
            largest = max(largest, (x - y)[unequal].abs().max().item())
            apart += (x - y)[unequal].square().sum().item()
        size += x.square().sum().item()
    total = a.nbytes // a.dtype.itemsize
    relative = (apart / size) ** 0.5 if size else math.inf
    return [f"{count:,} of {total:,} values differ, by up to {largest:.3g} ({relative:.3g} of the tensor's norm)"] if count else []


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
