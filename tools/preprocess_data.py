"""Turns text into Megatron's indexed datasets: tokenised, resumable, as fast as the disk.

    python tools/preprocess_data.py --input corpus/*.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-model tokenizer.model --append-eod --workers 16

writes data/corpus_text_document.{bin,idx}, as Megatron-LM's tool of this name does, with a sidecar of checksums and origins beside them.
Killed at any moment, the same command finishes the job with the same bytes. Bad lines are listed in data/corpus.rejected.jsonl.
Across machines: --num-shards and --shard-id (scripts/preprocess_array.sbatch), then tools/merge_datasets.py.
"""

import argparse
import os
import sys
import time

from megatron_llama3.config.errors import UserError, exit_on_user_error


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    data = parser.add_argument_group("input")
    data.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs, or - for standard input")
    data.add_argument("--input-format", choices=["auto", "jsonl", "text", "parquet"], default="auto", help="default: by file name")
    data.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys (Parquet: columns), each to its own dataset")
    data.add_argument("--bad-lines", choices=["skip", "fatal"], default="skip", help="skipped lines are counted and listed in a report")
    data.add_argument("--strict", action="store_true", help="refuse a folder in which there is something that is not read")
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-model", required=True, metavar="PATH", help="tokenizer.model, tokenizer.json, or a folder with one")
    tokens.add_argument("--tokenizer-type", choices=["TikTokenizer", "HuggingFaceTokenizer"], help="as in Megatron-LM; the file tells")
    tokens.add_argument("--append-eod", action="store_true", help="<|end_of_text|> after every document")
    tokens.add_argument("--prepend-bod", action="store_true", help="<|begin_of_text|> before every document")
    tokens.add_argument("--parse-special-tokens", action="store_true", help="the spelling of a special token in a text becomes that token")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.{bin,idx,json,sources.npy}")
    output.add_argument("--workers", type=int, default=1, help="processes that read and tokenise")
    output.add_argument("--log-interval", type=int, default=100_000, metavar="DOCUMENTS", help="between progress lines in a log")
    output.add_argument("--num-shards", type=int, default=1, help="machines that share the input, each with its own --shard-id")
    output.add_argument("--shard-id", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    started = time.monotonic()
    flags = vars(parse_arguments())
    flags.pop("tokenizer_type")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start threads for products that nothing here computes
    from megatron_llama3.data.preprocess import PreprocessOptions, preprocess

    options = PreprocessOptions(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()})
    summary, outputs = preprocess(options)
    seconds = time.monotonic() - started
    print(f"wrote {', '.join(outputs)}")
    compression = summary.characters / max(summary.tokens, 1)
    print(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, {compression:.2f} characters per token, "
        f"longest document {summary.longest:,} tokens, {seconds:.1f} s, {summary.tokens / seconds / 1e6:.2f} M tokens/s"
    )
    if summary.rejected:
        print(f"rejected {summary.rejected:,} bad lines: see {options.prefix}.rejected.jsonl", file=sys.stderr)
    if not summary.documents and options.num_shards == 1:
        raise UserError(f"--input {' '.join(options.input)}: no documents in it; the datasets written are empty")


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
