"""What a small run on Python source has learned: loss, text, and whether the text is Python or a copy.

    python tools/quickstart_report.py --export EXPORT --corpus CORPUS --data DATA --held-out-data DATA --log metrics.jsonl --plot loss.png

Loads a Hugging Face export in transformers, continues held-out prompts with it, and prints its numbers beside those of real held-out text.
Exit status 1 if the held-out loss is not below 0.6 of the corpus's unigram entropy.
"""

import argparse
import io
import json
import math
import sys
import tokenize
from pathlib import Path

import numpy as np

from megatron_llama3.config.errors import UserError, exit_on_user_error
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.training.events import read_metrics

LOSS_SHARE = 0.6
WINDOW = 512
PROMPTS = 16
PROMPT_CHARACTERS, NEW_TOKENS = 300, 96
SHORTEST_RUN = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="Hugging Face folder with its tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train.jsonl and held_out.jsonl")
    parser.add_argument("--data", type=Path, required=True, help="indexed dataset of the training text, without .bin")
    parser.add_argument("--held-out-data", type=Path, required=True, help="indexed dataset of the held-out text, without .bin")
    parser.add_argument("--log", type=Path, required=True, help="metrics.jsonl of the run")
    parser.add_argument("--plot", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    for path in (args.export / "config.json", args.corpus / "train.jsonl", args.corpus / "held_out.jsonl", args.log):
        if not path.is_file():
            raise UserError(f"{path}: no such file; scripts/quickstart.sh makes it")
    train, held_out = (documents(args.corpus / f"{name}.jsonl") for name in ("train", "held_out"))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.export)
    model = AutoModelForCausalLM.from_pretrained(args.export).eval()
    train_tokens, held_out_tokens = (d.tokens(0, d.num_tokens) for d in map(IndexedDataset, (args.data, args.held_out_data)))
    entropy, alike = unigram_entropy(train_tokens), unigram_loss(train_tokens, held_out_tokens)
    total, count = (sum(numbers) for numbers in zip(*(summed_loss(model, tokenizer, text) for _, text in held_out), strict=True))
    loss, bits = total / count, total / sum(len(text.encode()) for _, text in held_out) / math.log(2)
    prompted = [second_half(text) for _, text in held_out if len(text) > 8 * PROMPT_CHARACTERS]
    prompts, real = prompts_and_rest(spread(prompted, PROMPTS))
    generated = continuations(model, tokenizer, prompts)
    show_samples(prompts, generated)
    print_numbers(loss, bits, entropy, alike, real, generated, "\0".join(text for _, text in train))
    plot_losses(args.log, args.plot, entropy, loss)
    print(f"loss plot: {args.plot}")
    if loss >= LOSS_SHARE * entropy:
        print(f"the held-out loss is not below {LOSS_SHARE} of the unigram entropy", file=sys.stderr)
        raise SystemExit(1)


def documents(path: Path) -> list[tuple[str, str]]:
    """(path, text) of each line of a corpus file."""
    rows = map(json.loads, path.open(encoding="utf-8"))
    return [(row["path"], row["text"]) for row in rows]


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly over the list."""
    return items[:: max(1, len(items) // count)][:count]


def unigram_entropy(tokens) -> float:
    """Entropy of a single token of the corpus, in nats: the loss of a model that knows the frequencies and nothing else."""
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def unigram_loss(train, held_out) -> float:
    """Nats a held-out token under the training text's frequencies, each token counted once more: near the entropy if the two are alike."""
    size = int(max(train.max(), held_out.max())) + 1
    counts = np.bincount(train, minlength=size) + 1
    return float(-np.log(counts / counts.sum())[held_out].mean())


def summed_loss(model, tokenizer, text: str) -> tuple[float, int]:
    """(summed negative log-likelihood, number of tokens predicted) of a document alone, in windows of WINDOW tokens."""
    import torch

    total, count = 0.0, 0
    for window in torch.tensor(tokenizer(text)["input_ids"]).split(WINDOW):
        if len(window) > 1:
            with torch.no_grad():
                logits = model(window[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    return total, count


def second_half(text: str) -> str:
    """From the first whole line of it on: code, where a file begins with words."""
    return text[text.find("\n", len(text) // 2) + 1 :]


def prompts_and_rest(documents: list[str]) -> tuple[list[str], list[str]]:
    """The beginning of each document, up to the end of a line, and what really follows."""
    cuts = [document.find("\n", PROMPT_CHARACTERS) + 1 for document in documents]
    return [d[:cut] for d, cut in zip(documents, cuts, strict=True)], [d[cut:] for d, cut in zip(documents, cuts, strict=True)]


def continuations(model, tokenizer, prompts: list[str]) -> list[str]:
    import torch

    torch.manual_seed(1)
    result = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=0)
        result.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return result


def show_samples(prompts: list[str], generated: list[str]) -> None:
    for number, (prompt, text) in enumerate(zip(prompts[:3], generated[:3], strict=True), 1):
        print(f"---- held-out prompt {number} (its last lines)\n{prompt[-160:].rstrip()}\n---- generated\n{text.rstrip()}")
    print("----")


def print_numbers(loss: float, bits: float, entropy: float, alike: float, real: list[str], generated: list[str], train: str) -> None:
    real = [text[: len(made)] for text, made in zip(real, generated, strict=True)]
    copied = {name: longest_copied_run("\n".join(found), train) for name, found in (("generated", generated), ("real", real))}
    rows = [
        ("held-out loss, nats a token", f"{loss:.3f}", f"must be below {LOSS_SHARE * entropy:.3f}, {LOSS_SHARE} of the entropy"),
        ("the same, bits a byte", f"{bits:.3f}", "whatever the tokenizer is"),
        ("unigram entropy of the corpus", f"{entropy:.3f}", f"the loss is {loss / entropy:.2f} of it"),
        ("held-out text by its frequencies", f"{alike:.3f}", "about the entropy, where both are drawn alike"),
        ("generated lines tokenize accepts", f"{accepted_share(generated):.0%}", f"of real held-out lines: {accepted_share(real):.0%}"),
        ("longest run copied from training", f"{len(copied['generated'])} characters", f"of real held-out text: {len(copied['real'])}"),
    ]
    for name, value, beside in rows:
        print(f"{name:<33} {value:>14}   {beside}")
    print(f"that run: {copied['generated']!r}")


def accepted_share(found: list[str]) -> float:
    """The share of non-blank lines that Python's tokenizer accepts, each line alone; the last of a text may be cut off and is left out."""
    lines = [line.strip() for text in found for line in text.split("\n")[:-1] if line.strip()]
    return sum(map(tokenizes, lines)) / max(1, len(lines))


def tokenizes(line: str) -> bool:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)


def longest_copied_run(text: str, source: str) -> str:
    """The longest substring of `text` that is in `source`, "" where none has SHORTEST_RUN bytes."""
    sought, best = text.encode(), b""
    searched = candidate_stretches(source.encode(), sought)
    for start in range(len(sought)):
        while start + len(best) < len(sought) and sought[start : start + len(best) + 1] in searched:
            best = sought[start : start + len(best) + 1]
    return best.decode(errors="ignore") if len(best) >= SHORTEST_RUN else ""


def candidate_stretches(source: bytes, text: bytes) -> bytes:
    """The stretches of `source`, of SHORTEST_RUN bytes or more, whose every 8 bytes are in `text` too: a copied run lies in one."""

    def eights(data: bytes, offset: int) -> np.ndarray:
        return np.frombuffer(data, "<u8", max(0, len(data) - offset) // 8, min(offset, len(data)))

    wanted = np.unique(np.concatenate([eights(text, offset) for offset in range(8)]))
    found = np.zeros(len(source) + 1, bool)
    for offset in range(8):
        here = eights(source, offset)
        found[offset::8][: len(here)] = np.isin(here, wanted)
    borders = np.flatnonzero(np.diff(found, prepend=False)).reshape(-1, 2)
    return b"\0".join(source[first : last + 7] for first, last in borders if last + 7 - first >= SHORTEST_RUN)


def plot_losses(log: Path, plot: Path, entropy: float, final: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(log)
    figure, axes = plt.subplots(figsize=(8, 5))
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "held-out, as trained on", "o-")):
        points = [(record["consumed_tokens"] / 1e6, record[key]) for record in records if key in record]
        axes.plot(*zip(*points), style, label=label)
    axes.plot(points[-1][0], final, "*", markersize=12, label="held-out, whole, after export")
    axes.axhline(entropy, color="gray", linestyle=":", label="unigram entropy")
    axes.axhline(LOSS_SHARE * entropy, color="gray", linestyle="--", label=f"{LOSS_SHARE} of it")
    axes.set(xlabel="million tokens", ylabel="loss, nats a token", title=f"held-out loss at the end: {final:.2f}")
    axes.legend()
    figure.savefig(plot, dpi=120)


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
