"""Tokens per second and peak memory of tools/preprocess_data.py beside tiktoken, Hugging Face tokenizers and gigatoken alone.

    python benchmarks/preprocess.py --megabytes 200 --workers 1 2 [--text /usr/share/doc ...] [--save]

The corpus is real text that any machine has: the distinct files of Python's standard library and site-packages, and of the folders that
--text names. Every measurement is a
fresh process, so that no cache has seen the text; libraries are timed on texts already in memory, without their start; the tool's time is
that of its whole process: start, reading, JSON, tokenising, writing, syncing. Processor time is given beside wall time, for machines that
have other work to do. `--save` appends the table to benchmarks/RESULTS.md.
"""

import argparse
import datetime
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import resource
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cpp", ".js", ".html", ".json", ".yaml")
# The speed of these two does not change with size, and they are slow.
HUGGING_FACE_BYTES, TIKTOKEN_BYTES = 20_000_000, 60_000_000
GIGATOKEN_BLOCK_BYTES = 64 << 20


def write_corpus(path: Path, size: int, folders: list[Path]) -> int:
    """JSONL of distinct files in random order, up to `size` bytes of text; returns the bytes it has. `folders`: see --text."""
    files, seen, written = [], set(), 0
    for folder in {sysconfig.get_path("stdlib"), *site.getsitepackages()}:
        files += [file for file in Path(folder).rglob("*") if file.suffix in SUFFIXES]
    files += [file for folder in folders for file in folder.rglob("*")]
    files = sorted({file.resolve() for file in files if file.is_file()})
    random.Random(0).shuffle(files)
    with open(path, "wb") as output:
        for file in files:
            text = read_text(file)
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen or not text:
                continue
            seen.add(digest)
            output.write(json.dumps({"file": file.name, "text": text}, ensure_ascii=False).encode() + b"\n")
            written += len(text.encode())
            if written >= size:
                break
    return written


def read_text(file: Path) -> str:
    """The text of a file, gunzipped where it ends in .gz; "" where it is none, or over 5 MB."""
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    try:
        return data.decode() if len(data) <= 5_000_000 and b"\0" not in data else ""
    except UnicodeDecodeError:
        return ""


def encode_alone(library: str, corpus: str, model: str, workers: int) -> dict:
    """Runs in a process of its own: {"tokens", "seconds", "cpu"} of one library on texts in memory."""
    from megatron_llama3.tokenizer.llama3 import load_tokenizer
    from megatron_llama3.tokenizer.vocabulary_files import huggingface_json

    with open(corpus, "rb") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = load_tokenizer(model)
    if library == "tiktoken":
        encoding, texts = tokenizer.encoding, first_bytes(texts, TIKTOKEN_BYTES)
        started, cpu = time.perf_counter(), time.process_time()
        tokens = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=workers)))
    elif library == "tokenizers":
        from tokenizers import Tokenizer

        encoder, texts = Tokenizer.from_str(huggingface_json(tokenizer.ranks, {})), first_bytes(texts, HUGGING_FACE_BYTES)
        started, cpu = time.perf_counter(), time.process_time()
        tokens = sum(len(encoded.ids) for encoded in encoder.encode_batch_fast(texts, add_special_tokens=False))
    else:
        import awkward
        from gigatoken.gigatoken_rs import load_hf_json

        # Its fastest calls of those tried: text by text on one thread; on several 64 MB at a time (all at once takes up to twice as long).
        encoder, texts = load_hf_json(huggingface_json(tokenizer.ranks, {})), [text.encode() for text in texts]
        blocks = in_blocks(texts, GIGATOKEN_BLOCK_BYTES)
        started, cpu = time.perf_counter(), time.process_time()
        if workers == 1:
            tokens = sum(len(encoder.encode(text)) for text in texts)
        else:
            tokens = sum(int(awkward.count(encoder.encode_batch(block, parallel=True))) for block in blocks)
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def first_bytes(texts: list, size: int) -> list:
    """The first of `texts`, up to `size` characters or bytes in all."""
    return in_blocks(texts, size)[0]


def in_blocks(texts: list, size: int) -> list[list]:
    """`texts` in lists of `size` characters or bytes each, or a little more."""
    blocks, held = [[]], 0
    for text in texts:
        if held >= size:
            blocks.append([])
            held = 0
        blocks[-1].append(text)
        held += len(text)
    return blocks


def measure(command: list[str], threads: int) -> tuple[str, dict]:
    """Standard output of a command, and {"seconds", "cpu", "memory"} of its process tree: memory is the peak sum of PSS in MB, sampled."""
    threading = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": str(threads > 1).lower()}
    environment = {**os.environ, **threading, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed tool is not compiled anew at each start
    cpu_before = _children_cpu()
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_memory, _tree(process.pid))))
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with status {process.returncode}")
    return process.stdout.read(), {"seconds": seconds, "cpu": _children_cpu() - cpu_before, "memory": peak / 1000}


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in _tree(int(child)))]


def _memory(pid: int) -> int:
    """kB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def run_all(corpus: Path, model: str, workers: list[int], repeats: int) -> list[dict]:
    """Rows of {"what", "workers", "tokens", "seconds", "cpu", "memory"}: of each measurement the fastest of `repeats`, taken in turns."""
    rows: dict[tuple[str, int], dict] = {}
    for _ in range(repeats):
        for count in workers:
            for what in ("tiktoken", "tokenizers", "gigatoken", "preprocess_data.py"):
                row = measure_one(what, corpus, model, count)
                key = what, count
                rows[key] = min(rows.get(key, row), row, key=lambda one: one["seconds"] / one["tokens"])
                print(f"{what} x{count}: {row['tokens'] / row['seconds'] / 1e6:.2f} M tokens/s, {row['memory']:.0f} MB", file=sys.stderr)
    return list(rows.values())


def measure_one(what: str, corpus: Path, model: str, workers: int) -> dict:
    if what != "preprocess_data.py":
        output, used = measure([__file__, "--alone", what, str(corpus), model, str(workers)], workers)
        return {"what": what, "workers": workers, **used, **json.loads(output)}
    with tempfile.TemporaryDirectory(dir=corpus.parent) as folder:
        flags = ["--input", str(corpus), "--output-prefix", f"{folder}/out", "--tokenizer-model", model, "--workers", str(workers)]
        _, used = measure([str(ROOT / "tools" / "preprocess_data.py"), *flags], workers)
        tokens = os.path.getsize(f"{folder}/out_text_document.bin") // 4
    return {"what": what, "workers": workers, **used, "tokens": tokens}


def table(rows: list[dict]) -> str:
    lines = ["| what | workers | M tokens/s | x tiktoken | x gigatoken | M tokens/CPU s | x tiktoken | x gigatoken | s | peak MB |"]
    lines.append("|---|" + "---|" * 9)
    for row in sorted(rows, key=lambda row: row["workers"]):
        cells = [row["what"], str(row["workers"])]
        for unit in ("seconds", "cpu"):
            speeds = {one["what"]: one["tokens"] / one[unit] for one in rows if one["workers"] == row["workers"]}
            speed = speeds[row["what"]]
            cells += [f"{speed / 1e6:.2f}", f"{speed / speeds['tiktoken']:.2f}", f"{speed / speeds['gigatoken']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.2f} | {row['memory']:.0f} |")
    return "\n".join(lines)


def default_model() -> str:
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        raise SystemExit("error: --tokenizer-model: llama-models is not installed; name a tokenizer.model")
    return str(Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model")


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        library, corpus, model, workers = sys.argv[2:]
        print(json.dumps(encode_alone(library, corpus, model, int(workers))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--text", type=Path, nargs="*", default=[], metavar="FOLDER", help="every file of UTF-8 in these, too")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer-model", default=None)
    parser.add_argument("--note", default="", help="a line on the circumstances, for the record")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/RESULTS.md")
    flags = parser.parse_args()
    model = flags.tokenizer_model or default_model()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        size = write_corpus(corpus, flags.megabytes * 10**6, flags.text)
        rows = run_all(corpus, model, flags.workers, flags.repeats)
    packages = ("gigatoken", "tiktoken", "tokenizers", "orjson", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    processors = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    text = f"## preprocess.py, {datetime.date.today()}\n\n{os.cpu_count()} x {processors[0] if processors else '?'}, "
    text += f"Python {platform.python_version()}, {versions}; "
    text += f"{size / 1e6:.0f} MB of text, fastest of {flags.repeats}.\n`python benchmarks/preprocess.py {' '.join(sys.argv[1:])}`"
    text += f"\n{flags.note}\n\n" + table(rows) + "\n\n"
    print(text)
    if flags.save:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as results:
            results.write(text)


if __name__ == "__main__":
    main()
