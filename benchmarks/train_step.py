"""One training step beside Hugging Face's, in one run, as ratios: tokens/s, peak memory and, on a GPU, MFU.

    python benchmarks/train_step.py                       # CPU: a 25M-parameter model, fp32, one process
    python benchmarks/train_step.py --device cuda         # one GPU: 8 layers of 8B width, sequence 8,192, bf16, twice

On a GPU the sequence is one document, then packed: documents of the lengths in --document-lengths, one number a line. In
benchmarks/document_lengths.txt they are the modules of Python 3.11's standard library in Llama 3 tokens, shuffled. MFU counts unmasked
query-key pairs only.

Each side runs in a process of its own, in turns (ours, theirs, ours, ...), and the median of its steps counts. Both train the same layers
with AdamW on the same tokens; ours through the engine that `recipes.pretrain` uses, gradient clipping included on both sides.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {
    "cpu": {
        "hidden_size": 384,
        "num_layers": 12,
        "ffn_hidden_size": 1024,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "vocab_size": 8192,
    },
    "cuda": {
        "hidden_size": 4096,
        "num_layers": 8,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "vocab_size": 128256,
    },
}
BATCH = {"cpu": (4, 512), "cuda": (1, 8192)}  # sequences, tokens each
H100_TFLOPS = 989.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each turn, after two to warm up")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--document-lengths", default=str(Path(__file__).with_name("document_lengths.txt")), metavar="FILE")
    parser.add_argument("--packed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["ours", "theirs", "theirs+liger", "head"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        documents = document_lengths(args.document_lengths if args.packed else None, BATCH[args.device][1])
        print(json.dumps(measure(args.side, args.device, args.steps, documents)))
        return
    sides = ["ours", "theirs"] + (["theirs+liger", "head"] if args.device == "cuda" else [])
    for packed in [False, True] if args.device == "cuda" else [False]:
        print("\n" + (f"documents of {args.document_lengths}" if packed else "one document a sequence"))
        report({side: turns for side, turns in run_in_turns(sides, args, packed).items() if turns})


def run_in_turns(sides: list[str], args, packed: bool) -> dict[str, list[dict]]:
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for turn in range(args.turns):
        for side in sides:
            command = [sys.executable, __file__, "--side", side, "--device", args.device, "--steps", str(args.steps)]
            command += ["--document-lengths", args.document_lengths] + ["--packed"] * packed
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{side} could not run: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            results[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"turn {turn + 1} {side}: {results[side][-1]}", flush=True)
    return results


def report(results: dict[str, list[dict]]) -> None:
    if "ours" not in results:
        sys.exit("error: our side could not run, see above")
    best = {side: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for side, turns in results.items()}
    print(f"\n{'':14}" + "".join(f"{key:>26}" for key in best["ours"]))
    for side, numbers in best.items():
        print(f"{side:14}" + "".join(f"{value:26,.3f}" for value in numbers.values()))
    for side in (s for s in best if s.startswith("theirs")):
        speed = best["ours"]["tokens_per_second"] / best[side]["tokens_per_second"]
        memory = best["ours"]["peak_memory_mib"] / best[side]["peak_memory_mib"]
        print(f"ours / {side}: tokens/s {speed:.3f}, peak memory {memory:.3f}")
    if "head" in best:
        share = best["ours"]["tokens_per_second"] / best["head"]["tokens_per_second"]
        print(f"the output layer and loss take {share:.1%} of our step")


def document_lengths(path: str | None, seq_length: int) -> list[int]:
    """Lengths that fill one sequence exactly: the file's, in order, the last one cut."""
    if path is None:
        return [seq_length]
    lengths, left = [], seq_length
    for line in Path(path).read_text().splitlines():
        length = min(int(line), left)
        lengths.append(length)
        left -= length
        if left == 0:
            return lengths
    return [*lengths, left]


def measure(side: str, device: str, steps: int, documents: list[int]) -> dict:
    import torch

    if device == "cpu":
        torch.set_num_threads(os.cpu_count())
    step, before = {"ours": ours, "theirs": theirs, "theirs+liger": liger, "head": head}[side](device, documents)
    seconds = []
    for i in range(steps + 2):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            seconds.append(time.perf_counter() - started)
    batch, length = BATCH[device]
    median = statistics.median(seconds)
    result = {"tokens_per_second": batch * length / median}
    if device == "cuda":
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        result["mfu_causal_percent"] = 100 * model_flops(device, documents) / median / (H100_TFLOPS * 1e12)
    else:
        result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return result


def model_flops(device: str, documents: list[int]) -> float:
    """FLOPs of one step, forward and backward, unmasked query-key pairs only."""
    shape = SHAPES[device]
    h, layers = shape["hidden_size"], shape["num_layers"]
    kv = h * shape["num_query_groups"] // shape["num_attention_heads"]
    matrices = layers * (2 * h * h + 2 * h * kv + 3 * h * shape["ffn_hidden_size"]) + h * shape["vocab_size"]
    batch, length = BATCH[device]
    pairs = batch * sum(n * (n + 1) // 2 for n in documents)
    return 6 * matrices * batch * length + 3 * 4 * layers * h * pairs


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def ours(device: str, documents: list[int]):
    from megatron_llama3.parallel.groups import initialize_groups
    from megatron_llama3.training.build import build_engine
    from megatron_llama3.training.objectives import NextToken

    config = our_config(device)
    groups = initialize_groups(config.parallel)
    before = resident_mib()
    engine = build_engine(config, groups)
    batch = our_batch(device, documents)

    def step() -> None:
        engine.forward_backward(batch, NextToken())
        engine.clip_gradients(1.0)
        engine.optimizer_step(1e-4)

    return step, before


def our_config(device: str):
    from megatron_llama3.config.model import ModelConfig
    from megatron_llama3.config.run import RunConfig

    config = RunConfig(model=ModelConfig(**SHAPES[device]))
    config.training.micro_batch_size, config.data.seq_length = BATCH[device]
    config.optimizer.bf16 = device == "cuda"
    config.parallel.compile_blocks = device == "cuda"
    return config


def our_batch(device: str, documents: list[int]):
    import numpy as np

    from megatron_llama3.data.loader import Batch

    batch, length = BATCH[device]
    stream = np.random.default_rng(0).integers(0, SHAPES[device]["vocab_size"], (1, batch, length + 1))
    ids = np.repeat(np.arange(len(documents), dtype=np.int32), documents)
    ids, positions = (np.broadcast_to(x, (1, batch, length)) for x in (ids, np.arange(length)))
    return Batch(stream[..., :-1], stream[..., 1:], np.ones((1, batch, length), bool), ids, positions)


def theirs(device: str, documents: list[int]):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    before = resident_mib()
    s = SHAPES[device]
    config = LlamaConfig(
        hidden_size=s["hidden_size"],
        intermediate_size=s["ffn_hidden_size"],
        num_hidden_layers=s["num_layers"],
        num_attention_heads=s["num_attention_heads"],
        num_key_value_heads=s["num_query_groups"],
        vocab_size=s["vocab_size"],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        use_cache=False,
    )
    config._attn_implementation = their_attention(device)
    model = LlamaForCausalLM(config).to(device)  # fp32 master weights; bf16 compute by autocast on a GPU, as ours
    if device == "cuda":
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch, length = BATCH[device]
    tokens = torch.randint(0, s["vocab_size"], (batch, length + 1), device=device)
    targets = tokens[:, 1:].contiguous()
    positions = torch.cat([torch.arange(n) for n in documents]).to(device).expand(batch, -1)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            inputs = {"position_ids": positions} if len(documents) > 1 else {}
            loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], shift_labels=targets, **inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, before


def their_attention(device: str) -> str:
    """FlashAttention where its package is installed, SDPA otherwise."""
    from importlib.util import find_spec

    return "flash_attention_2" if device == "cuda" and find_spec("flash_attn") else "sdpa"


def liger(device: str, documents: list[int]):
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return theirs(device, documents)


def head(device: str, documents: list[int]):
    """The output layer and loss alone, as our model runs them."""
    import torch

    from megatron_llama3.model.loss import token_log_probs
    from megatron_llama3.parallel.groups import initialize_groups
    from megatron_llama3.parallel.tensor_parallel import TensorParallel

    groups = initialize_groups(our_config(device).parallel)
    s, (batch, length) = SHAPES[device], BATCH[device]
    options = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    hidden = torch.randn(length, batch, s["hidden_size"], **options, requires_grad=True)
    weight = torch.randn(s["vocab_size"], s["hidden_size"], **options, requires_grad=True)
    targets = torch.randint(0, s["vocab_size"], (length, batch), device=device)
    tp, counted = TensorParallel(groups.tp), torch.ones(length, batch, device=device)

    def step() -> None:
        token_log_probs(hidden, weight, targets, 0, tp, 1024, counted).mean().backward()

    return step, resident_mib()


if __name__ == "__main__":
    main()
