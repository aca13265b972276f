"""Converts weights between the native format, Hugging Face's, Meta's, Megatron-LM's and (as input) GGUF, exactly and in little memory.

    python tools/convert_checkpoint.py --from hf --to native --load Llama-3.1-8B --save checkpoints/llama3.1-8b
    python tools/convert_checkpoint.py --from native --to hf --load checkpoints/run --save exported --dtype bfloat16
    python tools/convert_checkpoint.py --from hf --to meta --load Llama-3.1-405B --save meta --target-model-parallel-size 8 --no-verify
    python tools/convert_checkpoint.py --from megatron --to native --load megatron/run --save checkpoints/run --with-optimizer

Weights pass in blocks of rows, several files at a time. A native checkpoint is held to its checksums first. Before the result gets its name
it is read back and the logits of both sides are compared in fp32. What cannot be converted is one line, exit status 2, and leaves nothing
under the name of --save.
"""

import argparse
import contextlib
import ctypes
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error

FORMATS = ("native", "hf", "meta", "megatron")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--from", dest="source", required=True, choices=(*FORMATS, "gguf"), help="format of --load")
    parser.add_argument("--to", dest="target", required=True, choices=FORMATS, help="format of --save")
    parser.add_argument("--load", required=True, type=Path, metavar="PATH", help="folder (GGUF: file) to read")
    parser.add_argument("--save", required=True, type=Path, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument("--target-model-parallel-size", type=int, metavar="N", help="with --to meta: number of .pth files (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights (default: keep them; GGUF is dequantised to float32)")
    parser.add_argument("--tokenizer-model", type=Path, metavar="PATH", help="tokenizer to write (default: the one in --load)")
    parser.add_argument("--with-optimizer", action="store_true", help="native and megatron: Adam's state, main weights and step too")
    parser.add_argument("--true-vocab-size", type=int, metavar="N", help="with --from megatron: rows of the vocabulary that are no padding")
    parser.add_argument("--non-homogeneous-layers", action="store_true", help="with --to megatron: a key a layer, not one for all layers")
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        help="with --to megatron: the layers that will load it (default transformer_engine)",
    )
    parser.add_argument("--workers", type=int, help="files written at a time (default: up to 4)")
    parser.add_argument("--no-verify", action="store_true", help="neither hold a native source to its checksums nor compare logits")
    arguments = parser.parse_args()
    if arguments.target_model_parallel_size is not None and arguments.target != "meta":
        raise UserError("--target-model-parallel-size is for --to meta")
    if arguments.true_vocab_size is not None and arguments.source != "megatron":
        raise UserError("--true-vocab-size is for --from megatron")
    if (arguments.non_homogeneous_layers or arguments.transformer_impl) and arguments.target != "megatron":
        raise UserError("--non-homogeneous-layers and --transformer-impl are for --to megatron")
    if arguments.with_optimizer and not {arguments.source, arguments.target} <= {"native", "megatron"}:
        raise UserError("--with-optimizer: only the native and the megatron format hold the optimizer's state")
    if arguments.with_optimizer and arguments.target == "native" and arguments.dtype:
        raise UserError("--dtype: the native format keeps the optimizer's main weights as they are; leave it out with --with-optimizer")
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
    source = with_tokenizer(_open_source(arguments), arguments.tokenizer_model)
    size = source.nbytes(dtype) + (3 * source.nbytes() if source.optimizer else 0)
    sides = f"{arguments.load} ({arguments.source}) -> {arguments.save} ({arguments.target})"
    print(f"{sides}: {len(source.weights)} weights, {size / 1e9:.2f} GB")
    if arguments.source == "native" and not arguments.no_verify:
        check_files(arguments.load)
    with publish_folder(arguments.save, size) as aside:
        _write(arguments, source, aside, dtype)
        if not arguments.no_verify:
            _verify(arguments, source, aside, dtype)
    for line in _notes(arguments, source):
        print(f"note: {line}")
    print(f"done: {arguments.save}")


def _open_source(arguments: argparse.Namespace):
    """The WeightSource of --load. A native one is read without checksums: `check_files` holds all of it to them first."""
    from megatron_llama3.checkpoint.megatron import open_megatron
    from megatron_llama3.checkpoint.native import open_native

    if arguments.source == "megatron":
        return open_megatron(arguments.load, arguments.true_vocab_size, arguments.with_optimizer)
    if arguments.source == "native":
        return open_native(arguments.load, checksums=False, with_optimizer=arguments.with_optimizer)
    return _open(arguments.source, arguments.load)


def _open(kind: str, path: Path):
    """The WeightSource of a folder or file of that kind."""
    from megatron_llama3.checkpoint.gguf import open_gguf
    from megatron_llama3.checkpoint.huggingface import open_hf
    from megatron_llama3.checkpoint.megatron import open_megatron
    from megatron_llama3.checkpoint.meta import open_meta
    from megatron_llama3.checkpoint.native import open_native

    return {"native": open_native, "hf": open_hf, "meta": open_meta, "megatron": open_megatron, "gguf": open_gguf}[kind](path)


def _write(arguments: argparse.Namespace, source, folder: Path, dtype) -> None:
    from megatron_llama3.checkpoint.huggingface import write_hf
    from megatron_llama3.checkpoint.megatron import write_megatron
    from megatron_llama3.checkpoint.meta import write_meta
    from megatron_llama3.checkpoint.native import write_native

    if arguments.target == "meta":
        shards = 1 if arguments.target_model_parallel_size is None else arguments.target_model_parallel_size
        write_meta(source, folder, shards, dtype, arguments.workers)
    elif arguments.target == "megatron":
        is_te = arguments.transformer_impl != "local"
        write_megatron(source, folder, dtype, arguments.workers, not arguments.non_homogeneous_layers, is_te)
    else:
        {"native": write_native, "hf": write_hf}[arguments.target](source, folder, dtype, arguments.workers)


def _verify(arguments: argparse.Namespace, source, written: Path, dtype) -> None:
    """Compares the logits of what was read and of what was written. Raises UserError if they differ."""
    from megatron_llama3.checkpoint.compare_logits import compare_sides, side_logits
    from megatron_llama3.checkpoint.gguf import gguf_file

    path = gguf_file(arguments.load) if arguments.source == "gguf" else arguments.load
    before, reader = side_logits(arguments.source, path, source, dtype)
    after, other = side_logits(arguments.target, written, _open(arguments.target, written), None)
    error = compare_sides(before, after)
    print(f"verified: logits differ by {error:.1e} of their norm ({reader} on what was read, {other} on the result)")


def _notes(arguments: argparse.Namespace, source) -> list[str]:
    """What was left out, or the target format cannot hold, and the user should know."""
    from megatron_llama3.checkpoint.megatron.reader import extra_states, resolve_megatron

    notes, kind = [], arguments.target
    if arguments.source == "megatron" and (count := extra_states(resolve_megatron(arguments.load))):
        notes.append(f"{count} _extra_state entries (Transformer Engine's FP8 scales, empty without FP8) are left out")
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
