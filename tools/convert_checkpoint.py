"""Converts weights between the native format, Hugging Face's, Meta's and (as input) GGUF, exactly and in little memory.

    python tools/convert_checkpoint.py --from hf --to native --load Llama-3.1-8B --save checkpoints/llama3.1-8b
    python tools/convert_checkpoint.py --from native --to hf --load checkpoints/run --save exported --dtype bfloat16
    python tools/convert_checkpoint.py --from hf --to meta --load Llama-3.1-405B --save meta --target-model-parallel-size 8 --no-verify

Weights pass in blocks of rows, several files at a time. A native checkpoint is held to its checksums first. Before the result gets its name
it is read back and the logits of both sides are compared in fp32. What cannot be converted is one line, exit status 2, and leaves nothing
under the name of --save.
"""

import argparse
import contextlib
import ctypes
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error

DTYPES = ("float32", "bfloat16", "float16", "float64")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--from", dest="source", required=True, choices=("native", "hf", "meta", "gguf"), help="format of --load")
    parser.add_argument("--to", dest="target", required=True, choices=("native", "hf", "meta"), help="format of --save")
    parser.add_argument("--load", required=True, type=Path, metavar="PATH", help="folder (GGUF: file) to read")
    parser.add_argument("--save", required=True, type=Path, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument("--target-model-parallel-size", type=int, metavar="N", help="with --to meta: number of .pth files (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights (default: keep them; GGUF is dequantised to float32)")
    parser.add_argument("--tokenizer-model", type=Path, metavar="PATH", help="tokenizer to write (default: the one in --load)")
    parser.add_argument("--workers", type=int, help="files written at a time (default: up to 4)")
    parser.add_argument("--no-verify", action="store_true", help="neither hold a native source to its checksums nor compare logits")
    arguments = parser.parse_args()
    if arguments.target_model_parallel_size is not None and arguments.target != "meta":
        raise UserError("--target-model-parallel-size is for --to meta")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: at least 1 is needed")
    if not arguments.load.exists():
        raise UserError(f"--load {arguments.load}: no such file or folder")
    return arguments


def return_freed_blocks() -> None:
    """Tells glibc to hand blocks of 1 MB and more back to the system at once: it would keep up to 32 MB of them in each thread's arena."""
    mmap_threshold = -3
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such knob
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def main() -> None:
    arguments = parse_arguments()
    return_freed_blocks()
    import torch

    from megatron_llama3.checkpoint.files.publish import publish_folder
    from megatron_llama3.checkpoint.native import check_files
    from megatron_llama3.checkpoint.tokenizer_files import with_tokenizer

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    source = with_tokenizer(_open(arguments.source, arguments.load, is_held=True), arguments.tokenizer_model)
    shards = 1 if arguments.target_model_parallel_size is None else arguments.target_model_parallel_size
    size = source.nbytes(dtype)
    sides = f"{arguments.load} ({arguments.source}) -> {arguments.save} ({arguments.target})"
    print(f"{sides}: {len(source.weights)} weights, {size / 1e9:.2f} GB")
    if arguments.source == "native" and not arguments.no_verify:
        check_files(arguments.load)
    with publish_folder(arguments.save, size) as aside:
        _write(arguments.target, source, aside, dtype, shards, arguments.workers)
        if not arguments.no_verify:
            _verify(arguments, source, aside, dtype)
    for line in _notes(arguments.target, source):
        print(f"note: {line}")
    print(f"done: {arguments.save}")


def _open(kind: str, path: Path, is_held: bool = False):
    """The WeightSource of a folder or file of that kind; `is_held`: no checksums as it is read, `check_files` holds all of it to them."""
    from megatron_llama3.checkpoint.gguf import open_gguf
    from megatron_llama3.checkpoint.huggingface import open_hf
    from megatron_llama3.checkpoint.meta import open_meta
    from megatron_llama3.checkpoint.native import open_native

    if kind == "native":
        return open_native(path, checksums=not is_held)
    return {"hf": open_hf, "meta": open_meta, "gguf": open_gguf}[kind](path)


def _write(kind: str, source, folder: Path, dtype, shards: int, workers: int | None) -> None:
    from megatron_llama3.checkpoint.huggingface import write_hf
    from megatron_llama3.checkpoint.meta import write_meta
    from megatron_llama3.checkpoint.native import write_native

    if kind == "meta":
        write_meta(source, folder, shards, dtype, workers)
    else:
        {"native": write_native, "hf": write_hf}[kind](source, folder, dtype, workers)


def _verify(arguments: argparse.Namespace, source, written: Path, dtype) -> None:
    """Compares the logits of what was read and of what was written. Raises UserError if they differ."""
    from megatron_llama3.checkpoint.compare_logits import compare_sides, side_logits
    from megatron_llama3.checkpoint.gguf import gguf_file

    path = gguf_file(arguments.load) if arguments.source == "gguf" else arguments.load
    before, reader = side_logits(arguments.source, path, source, dtype)
    after, other = side_logits(arguments.target, written, _open(arguments.target, written), None)
    error = compare_sides(before, after)
    print(f"verified: logits differ by {error:.1e} of their norm ({reader} on what was read, {other} on the result)")


def _notes(kind: str, source) -> list[str]:
    """What the target format cannot hold and the user should know."""
    notes = []
    model = source.model
    factors = (model.rope_scaling_factor, model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor)
    numbers = (*factors, model.rope_scaling_original_max_position_embeddings)
    if kind == "meta" and model.use_rope_scaling and numbers != (8.0, 1.0, 4.0, 8192):
        notes.append("params.json holds the RoPE scaling numbers, but Meta's own code uses 8, 1, 4 and 8192 whatever it says")
    if kind == "hf" and not source.assets:
        notes.append("no tokenizer was found beside the weights: name one with --tokenizer-model")
    return notes


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
