"""Speed of weight conversion beside `cp` on the same bytes, in one run: warm page cache, every file synced, the median of several rounds.

    python benchmarks/convert.py [--layers 16] [--rounds 3] [--folder DIR] [--append benchmarks/RESULTS.md]

The model has random weights in bf16, of Llama 3.2 1B's width and untied. Floor: 60% of cp's bytes a second, aim 80%. `transformers` is the
way of its conversion script for Meta's files: torch.load, permute wq and wk, LlamaForCausalLM.save_pretrained.
Timed is the work of `convert_checkpoint.py --no-verify` (open, write, sync, rename), without the start of Python and the import of torch.
Before each timed run an untimed copy is written and removed: memory that lay idle was taken back by a virtual machine's host, and whoever
allocates it next waits for it (seen here: the same cp, four to five times as long).
Peak memory is anonymous memory (RssAnon) above what the imports take; mapped input files are page cache.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from megatron_llama3.checkpoint.files.publish import publish_folder, sync
from megatron_llama3.checkpoint.huggingface import open_hf, write_hf
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, WeightSource
from megatron_llama3.checkpoint.meta import open_meta, write_meta
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.sharding import weight_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="122 MB each, beside 1 GB of embedding and output layer")
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder); needs three times the model")
    parser.add_argument("--append", type=Path, metavar="FILE", help="Markdown file to add the table to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        lines = measure(Path(folder), arguments)
    print("\n".join(lines))
    if arguments.append:
        with open(arguments.append, "a") as file:
            file.write("\n".join(lines) + "\n\n")


def measure(folder: Path, arguments: argparse.Namespace) -> list[str]:
    source = random_model(arguments.layers, arguments.vocab_size)
    inputs = {"hf": folder / "hf", "native": folder / "native", "meta": folder / "meta"}
    with publish_folder(inputs["hf"]) as aside:
        write_hf(source, aside)
    with publish_folder(inputs["native"]) as aside:
        write_native(source, aside)
    with publish_folder(inputs["meta"]) as aside:
        write_meta(source, aside, 2)
    jobs: dict[str, tuple[Path, Callable[[Path], None]]] = {
        "hf -> native": (inputs["hf"], lambda out: write_native(open_hf(inputs["hf"]), out)),
        "native -> hf": (inputs["native"], lambda out: write_hf(open_native(inputs["native"]), out)),
        "hf -> meta, 2 shards": (inputs["hf"], lambda out: write_meta(open_hf(inputs["hf"]), out, 2)),
        "meta, 2 shards -> hf": (inputs["meta"], lambda out: write_hf(open_meta(inputs["meta"]), out)),
        "meta -> hf, transformers": (inputs["meta"], lambda out: transformers_way(inputs["meta"], out)),
    }
    gigabytes = source.nbytes() / 1e9
    rows = []
    for name, (path, job) in jobs.items():
        copies, times = [], []
        for _ in range(arguments.rounds):  # alternating, so that a busy machine is busy for both
            for runs, timed in ((copies, partial(copy, path)), (times, job)):
                cost(folder / "out", partial(copy, path))
                runs.append(cost(folder / "out", timed))
        ratio = median(copied.seconds / ours.seconds for copied, ours in zip(copies, times))
        speeds = " | ".join(f"{gigabytes / median(run.seconds for run in runs):.2f}" for runs in (copies, times))
        work = " | ".join(f"{median(run.cpu_seconds for run in runs):.1f}" for runs in (copies, times))
        rows.append(f"| {name} | {speeds} | {ratio:.2f} | {work} | {max(run.peak_bytes for run in times) / 1e6:.0f} |")
        print(rows[-1], flush=True)
    columns = ("conversion", "cp, GB/s", "conversion, GB/s", "conversion / cp", "cp, CPU s", "conversion, CPU s", "peak memory, MB")
    header = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return [*title(arguments, gigabytes), *header, *rows]


def title(arguments: argparse.Namespace, gigabytes: float) -> list[str]:
    sizes = f"--layers {arguments.layers} --vocab-size {arguments.vocab_size} --rounds {arguments.rounds}"
    command = f"python benchmarks/convert.py {sizes}" + (f" --folder {arguments.folder}" if arguments.folder else "")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.0f} during the run"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return [
        f"## Conversion beside cp, {datetime.date.today()}",
        "",
        f"`{command}`: {gigabytes:.2f} GB in bf16. {machine}; {versions}.",
        "Synced writes, warm cache, the median of the rounds' ratios; neither verification nor the import of torch is counted.",
        "",
    ]


def random_model(layers: int, vocab_size: int) -> WeightSource:
    """Weights of random bits, made block by block (exponents kept small, so that every value is finite)."""
    model = ModelConfig(
        num_layers=layers, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, num_query_groups=8, vocab_size=vocab_size
    )
    noise = torch.randn(4 << 20).bfloat16()

    def lazy(shape: tuple[int, ...], number: int) -> LazyTensor:
        def rows(start: int, stop: int) -> torch.Tensor:
            count = (stop - start) * torch.Size(shape[1:]).numel()
            return noise.roll(number).repeat(-(-count // len(noise)))[:count].view(stop - start, *shape[1:])

        return LazyTensor(shape, torch.bfloat16, rows)

    return WeightSource(model, {name: lazy(spec.shape, i) for i, (name, spec) in enumerate(weight_table(model).items())})


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def cost(out: Path, job: Callable[[Path], None]) -> Cost:
    """What writing a synced folder takes: wall time, CPU time, peak of anonymous memory above the start. The folder is removed."""
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    with publish_folder(out) as aside:
        job(aside)
    elapsed, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
    stop.set()
    watcher.join()
    shutil.rmtree(out)
    return Cost(elapsed, cpu, peak[0])


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", f"{source}/.", str(out)], check=True)
    for path in out.rglob("*"):
        sync(path)


def transformers_way(meta: Path, out: Path) -> None:
    """Whole shards in memory, joined and permuted into LlamaForCausalLM, then save_pretrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_llama3.checkpoint.huggingface.config import config_to_hf
    from megatron_llama3.checkpoint.names import rope_rows_to_halves, to_hf_name

    config = config_to_hf(open_meta(meta).model)
    shards = [torch.load(path, weights_only=True) for path in sorted(meta.glob("*.pth"))]
    state = {}
    for name in list(shards[0]):
        parts = [shard.pop(name) for shard in shards]
        whole = parts[0] if parts[0].dim() == 1 else torch.cat(parts, dim=1 if name.endswith((".wo.weight", ".w2.weight")) else 0)
        if name.endswith((".wq.weight", ".wk.weight")):
            whole = whole[rope_rows_to_halves(whole.shape[0] // config["head_dim"], config["head_dim"])]
        state[to_hf_name(name)] = whole
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(state, assign=True)
    model.save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
