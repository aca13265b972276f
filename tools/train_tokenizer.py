"""Trains a byte-level BPE vocabulary with Llama 3's split pattern and special tokens, or extends one.

    python tools/train_tokenizer.py --input corpus/*.jsonl --vocab-size 8192 --output tokenizer/
    python tools/train_tokenizer.py --input other_languages/ --extend tokenizer.model --add 28000 --output tokenizer/
    python tools/train_tokenizer.py ... --report english=en.txt german=de.txt

Writes tokenizer.model (tiktoken form) and tokenizer.json with tokenizer_config.json (Hugging Face form); with --report, prints characters
per token.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs")
    parser.add_argument("--input-format", choices=["auto", "jsonl", "text", "parquet"], default="auto", help="default: by file name")
    parser.add_argument("--json-key", default="text", help="key of the text in JSONL, column in Parquet")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--vocab-size", type=int, help="entries to train, the 256 special tokens included")
    parser.add_argument("--extend", metavar="BASE", help="keep the ids of this tokenizer.model, tokenizer.json or folder")
    parser.add_argument("--add", type=int, help="with --extend: tokens to learn on --input")
    parser.add_argument("--report", nargs="*", default=[], metavar="NAME=PATH", help="texts by language or domain to measure on")
    parser.add_argument("--max-bytes", type=int, help="stop reading --input after so many bytes of text")
    arguments = parser.parse_args()
    if (arguments.extend is None) == (arguments.vocab_size is None):
        parser.error("give either --vocab-size N, or --extend BASE with --add N")
    if (arguments.extend is None) != (arguments.add is None):
        parser.error("--extend and --add go together")
    return arguments


def main() -> None:
    flags = parse_arguments()
    from megatron_llama3.data.preprocess_texts import read_texts
    from megatron_llama3.tokenizer.llama3 import Tokenizer, load_tokenizer
    from megatron_llama3.tokenizer.train import characters_per_token, extend, train

    def texts_of(paths: list[str]) -> Iterator[str]:
        return read_texts(paths, flags.input_format, flags.json_key, flags.max_bytes)

    base = load_tokenizer(flags.extend) if flags.extend else None
    texts = texts_of(flags.input)
    tokenizer = extend(base, texts, flags.add) if base else train(texts, flags.vocab_size)
    tokenizer.save(flags.output)
    print(f"{flags.output}: {tokenizer.vocab_size} entries ({tokenizer.n_bpe} BPE tokens, 256 special tokens)")
    if not flags.report:
        return
    columns: dict[str, Tokenizer] = ({"base": base} if base else {}) | {"trained": tokenizer}
    print(f"{'characters per token':<24}" + "".join(f"{name:>10}" for name in columns))
    for name, path in map(_named_path, flags.report):
        ratios = (characters_per_token(column, texts_of([path])) for column in columns.values())
        print(f"{name:<24}" + "".join(f"{ratio:10.2f}" for ratio in ratios))


def _named_path(entry: str) -> tuple[str, str]:
    name, equals, path = entry.partition("=")
    if not equals:
        raise UserError(f"--report {entry}: expected NAME=PATH, for instance german=de.txt")
    return name, path


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
