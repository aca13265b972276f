"""Text from a checkpoint.

    python -m megatron_llama3.recipes.generate --load checkpoints/run --prompt "def main():" --greedy
    torchrun --nproc-per-node 2 -m megatron_llama3.recipes.generate --load-hf Llama-3.2-1B --prompt "The sea" --prompt "The sky"

All processes that torchrun starts share every matrix (tensor parallelism). Without a GPU it runs on the CPU in float32.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llama3.config.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from megatron_llama3.checkpoint.lazy_tensor import WeightSource
    from megatron_llama3.inference.engine import Completion
    from megatron_llama3.tokenizer.foreign_tokenizer import AnyTokenizer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--load", type=Path, help="native checkpoint: the --save folder of a run, or one iter_ folder in it")
    where.add_argument("--load-hf", type=Path, help="Hugging Face folder: config.json and safetensors")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; give it several times for a batch")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.9, help="draw from the fewest tokens that reach this probability")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token, as --temperature 0")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer.model, tokenizer.json or a folder; default: the checkpoint's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--no-load-checksums", action="store_true", help="do not hold what is loaded to the checksums of its manifest")
    args = parser.parse_args(argv)
    if args.no_load_checksums and args.load_hf:
        raise UserError("--no-load-checksums: a Hugging Face folder has none")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: must be 0 (greedy) or above")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    for folder in (args.load, args.load_hf):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{'--load' if args.load else '--load-hf'} {folder}: no such folder")
    source, tokenizer = open_checkpoint(args)  # before process groups: what can be refused costs no start
    completions = complete(args, source, tokenizer)
    if int(os.environ.get("RANK", 0)) == 0:
        for prompt, completion in zip(args.prompt, completions, strict=True):
            print(f"--- {len(completion.token_ids)} tokens{', stopped' if completion.stopped else ''}")
            print(prompt + tokenizer.decode(completion.token_ids), flush=True)


def open_checkpoint(args: argparse.Namespace) -> tuple["WeightSource", "AnyTokenizer"]:
    """The stored weights, and the tokenizer that was named, or that lies with them, or that their run was trained with."""
    from megatron_llama3.checkpoint.huggingface import open_hf
    from megatron_llama3.checkpoint.native.folder import CONFIG_FILE, TOKENIZER_FOLDER, resolve_native
    from megatron_llama3.checkpoint.native.manifest import damage
    from megatron_llama3.checkpoint.native.weights import open_native
    from megatron_llama3.config.command_line import load_run_config
    from megatron_llama3.tokenizer.foreign_tokenizer import open_tokenizer

    if args.load_hf:
        source, path = open_hf(args.load_hf), args.load_hf
    else:
        folder = resolve_native(args.load)
        reason = damage(folder)
        if reason is not None:
            raise UserError(f"--load {args.load}: {reason}")
        source, kept = open_native(folder, checksums=not args.no_load_checksums), folder / TOKENIZER_FOLDER
        path = kept if source.assets and kept.is_dir() else load_run_config(str(folder / CONFIG_FILE)).data.tokenizer_model
    path = args.tokenizer_model or path
    if path is None:
        raise UserError(f"{args.load}: its run_config.yaml names no tokenizer: give --tokenizer-model")
    if not Path(path).exists():
        raise UserError(f"{args.load}: the tokenizer that its run_config.yaml names, {path}, is not here: give --tokenizer-model")
    return source, open_tokenizer(path)


def complete(args: argparse.Namespace, source: "WeightSource", tokenizer: "AnyTokenizer") -> list["Completion"]:
    import torch

    from megatron_llama3.config.parallel import ParallelConfig
    from megatron_llama3.inference.engine import InferenceEngine
    from megatron_llama3.inference.load import check_layout, load_llama
    from megatron_llama3.inference.sampling import Sampling
    from megatron_llama3.parallel.groups import destroy_groups, initialize_groups

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_layout(source, world_size)
    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=world_size, world_size=world_size))
    dtype = getattr(torch, args.dtype or ("bfloat16" if groups.device.type == "cuda" else "float32"))
    engine = InferenceEngine(load_llama(source, groups, dtype), tokenizer.vocab_size)
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_p, args.seed)
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in args.prompt]
    completions = engine.generate(prompts, args.max_new_tokens, sampling, _stop_ids(source, tokenizer))
    destroy_groups()
    return completions


def _stop_ids(source: "WeightSource", tokenizer: "AnyTokenizer") -> set[int]:
    ends = source.generation.get("eos_token_id", [])
    return {*tokenizer.stop_ids, *(ends if isinstance(ends, list) else [ends])}


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
