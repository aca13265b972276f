"""Llama 3 pretraining in one plain file, which the package and every certificate are held to. It imports nothing of the package.

One process, float64, no parallelism, no packing, no mask: every document of every sequence runs through the model alone. The project's own
rules are written down a second time: initial weights, both shuffles, blend, packing, ramps. Slow, for small models only.
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """A run's numbers, by the names of its flags. Ramps are (tokens seen, value) with rising tokens, the first at 0."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    norm_epsilon: float
    rotary_base: float
    init_method_std: float
    untie_embeddings_and_output_weights: bool
    qk_layernorm: bool
    use_rope_scaling: bool
    rope_scaling_factor: float
    rope_scaling_low_freq_factor: float
    rope_scaling_high_freq_factor: float
    rope_scaling_original_max_position_embeddings: int
    document_mask: bool
    reset_position_ids: bool
    loss_across_documents: bool
    lr: float
    min_lr: float
    lr_warmup_iters: int
    lr_decay_iters: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    clip_grad: float
    seed: int


class Sequence(NamedTuple):
    """Arrays [s]: a token, its target, whether that counts, the document and position of the token. Numbers of documents only compare."""

    tokens: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    documents: np.ndarray
    positions: np.ndarray


# --- data: Megatron's indexed files, shuffled by document, packed, permuted by block, blended ---


class Corpus:
    """The first `share` of a dataset's documents as an endless stream, in a new order each epoch; read in blocks of `longest` tokens."""

    def __init__(self, prefix: str, share: float, seed: int, longest: int):
        index, raw = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
        _, _, code, sequences, borders = struct.unpack("<9sQBQQ", index[:34])
        dtype = np.dtype({1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code])
        lengths = np.frombuffer(index, "<i4", sequences, 34)
        first_sequences = np.frombuffer(index, "<i8", borders, 34 + 12 * sequences)
        tokens = np.frombuffer(raw, dtype)
        ends = np.concatenate(([0], np.cumsum(lengths)))[first_sequences]
        documents = [tokens[start:end] for start, end in pairwise(ends)]
        self.documents = documents[: round(share * len(documents))]
        digest = hashlib.sha256(struct.pack("<QQQI", sequences, borders - 1, len(tokens), zlib.crc32(index)))
        for sample in range(16):
            start = max(0, len(tokens) - 1024) * sample // 15
            digest.update(tokens[start : start + 1024].astype("<i8").tobytes())
        self.key = f"{digest.hexdigest()[:32]} {seed}"
        self.tokens, self.owners, self.epochs = [], [], 0
        self.longest, self.window_end, self.groups = longest, 0, []
        self.order, self.given = [], 0  # where in the stream each given token is, and those that are about to be given

    def _add_epoch(self) -> None:
        """Documents in the order of random numbers without their lowest bits, as many as an index needs; ties by index."""
        count = len(self.documents)
        key = hashlib.sha256(f"{self.key} {self.epochs}".encode()).digest()
        random = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(count)
        low_bits = max(count - 1, 1).bit_length()
        for document in sorted(range(count), key=lambda i: (int(random[i]) >> low_bits, i)):
            self.tokens += self.documents[document].tolist()
            self.owners += [self.epochs * count + document] * len(self.documents[document])
        self.epochs += 1

    def _add_window(self) -> None:
        """The blocks that begin in one epoch, permuted, then cut into groups of 256 at most, of one size but for one."""
        start, period = self.window_end, sum(map(len, self.documents))
        epoch = start // period
        begins = range(start, (epoch + 1) * period, self.longest)
        order = permutation(len(begins), f"{self.key} {epoch} blocks")
        blocks = [list(range(begins[i], begins[i] + self.longest)) for i in order]
        groups = math.ceil(len(blocks) / 256)
        self.groups = [blocks[len(blocks) * i // groups : len(blocks) * (i + 1) // groups] for i in range(groups)]
        self.window_end = begins[-1] + self.longest

    def _add_group(self, missing: int, length: int) -> None:
        """The blocks of a group give `length` tokens in turns; the last one first what the sequence before still lacks."""
        if not self.groups:
            self._add_window()
        blocks = self.groups.pop(0)
        lead = missing if self.longest % length == 0 else 0
        self.order += blocks[-1][:lead]
        blocks[-1] = blocks[-1][lead:]
        for start in range(0, self.longest, length):
            for block in blocks:
                self.order += block[start : start + length]

    def next(self, length: int, settings: Settings) -> Sequence:
        """Targets are the next tokens of the stream. Where the sequence jumps in it, a document of its own begins."""
        end = self.given + length
        while len(self.order) < end:
            self._add_group((end - len(self.order)) % length, length)
        places, self.given = np.array(self.order[self.given : end]), end
        while len(self.tokens) <= max(places) + 1:
            self._add_epoch()
        tokens, owners = np.array(self.tokens), np.array(self.owners)
        inside = owners[places + 1] == owners[places]
        positions, documents = np.arange(length), np.zeros(length, int)
        for i in range(1, length):
            goes_on = places[i] == places[i - 1] + 1 and inside[i - 1]
            documents[i] = documents[i - 1] + (not goes_on)
            if settings.reset_position_ids:
                positions[i] = positions[i - 1] + 1 if goes_on else 0
        return Sequence(tokens[places], tokens[places + 1], inside | settings.loss_across_documents, documents, positions)


def permutation(count: int, key: str) -> list[int]:
    """Where each of `count` places goes: in each of 64 rounds pairs of numbers, those with the same sum, are swapped or not."""
    order = list(range(count))
    for turn in range(64):
        pivot, factor, summand = struct.unpack("<16sQQ", hashlib.sha256(f"{key} {turn}".encode()).digest())
        pivot = int.from_bytes(pivot, "little") % count
        swapped = [(factor * max(i, (pivot - i) % count) + summand) % 2**64 >= 2**63 for i in range(count)]
        order = [(pivot - i) % count if swapped[i] else i for i in order]
    return order


def next_corpus(weights: list[int], given: list[int]) -> int:
    """The corpus of the next sequence: of those that would not be more than one ahead of their share, the one that is late first."""
    slot, total = sum(given), sum(weights)
    open_to = [i for i, w in enumerate(weights) if w and given[i] * total // w <= slot]
    return min(open_to, key=lambda i: (math.ceil((given[i] + 1) * total / weights[i]), i))


def at(ramp: list[tuple[int, int]], tokens: int) -> int:
    """A threshold that is reached begins its phase."""
    return [value for start, value in ramp if start <= tokens][-1]


def batches(
    corpora: list[Corpus], weights: list[int], batch_ramp: list[tuple[int, int]], length_ramp: list[tuple[int, int]], settings: Settings
) -> Iterator[list[Sequence]]:
    """The global batch of each step, without end."""
    seen, given = 0, [0] * len(corpora)
    while True:
        size, length = at(batch_ramp, seen), at(length_ramp, seen)
        batch = []
        for _ in range(size):
            chosen = next_corpus(weights, given)
            given[chosen] += 1
            batch.append(corpora[chosen].next(length, settings))
        seen += size * length
        yield batch


# --- the model (paper, section 3.2), by Meta's weight names ---


def initial_weights(s: Settings) -> dict[str, Tensor]:
    """Matrices normal with `init_method_std`, those that end a residual branch smaller by sqrt(2 x layers), norms 1. Each weight has a
    generator, seeded by its name; a matrix above 2^20 elements would have several."""
    queries, keys = s.num_attention_heads * s.kv_channels, s.num_query_groups * s.kv_channels
    shapes = {"tok_embeddings.weight": (s.vocab_size, s.hidden_size), "norm.weight": (s.hidden_size,)}
    if s.untie_embeddings_and_output_weights:
        shapes["output.weight"] = (s.vocab_size, s.hidden_size)
    for layer in range(s.num_layers):
        shapes |= {
            f"layers.{layer}.attention_norm.weight": (s.hidden_size,),
            f"layers.{layer}.attention.wq.weight": (queries, s.hidden_size),
            f"layers.{layer}.attention.wk.weight": (keys, s.hidden_size),
            f"layers.{layer}.attention.wv.weight": (keys, s.hidden_size),
            f"layers.{layer}.attention.wo.weight": (s.hidden_size, queries),
            f"layers.{layer}.ffn_norm.weight": (s.hidden_size,),
            f"layers.{layer}.feed_forward.w1.weight": (s.ffn_hidden_size, s.hidden_size),
            f"layers.{layer}.feed_forward.w2.weight": (s.hidden_size, s.ffn_hidden_size),
            f"layers.{layer}.feed_forward.w3.weight": (s.ffn_hidden_size, s.hidden_size),
        }
        if s.qk_layernorm:
            shapes |= {f"layers.{layer}.attention.{name}.weight": (s.kv_channels,) for name in ("q_norm", "k_norm")}
    return {name: _initial(name, shape, s) for name, shape in shapes.items()}


def _initial(name: str, shape: tuple[int, ...], s: Settings) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float64)
    assert math.prod(shape) <= 1 << 20, f"{name} {shape}: too large for the reference"
    seed = int.from_bytes(hashlib.blake2b(f"{name}/{s.seed}/0".encode(), digest_size=8).digest(), "little") >> 1
    ends_a_branch = name.endswith(("wo.weight", "w2.weight"))
    std = s.init_method_std / math.sqrt(2 * s.num_layers) if ends_a_branch else s.init_method_std
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).double()


def frequency(pair: int, s: Settings) -> float:
    """Radians a position by which a pair of channels turns; Llama 3.1 slows the long wavelengths."""
    plain = s.rotary_base ** (-2 * pair / s.kv_channels)
    if not s.use_rope_scaling:
        return plain
    turns = s.rope_scaling_original_max_position_embeddings * plain / (2 * math.pi)
    if turns > s.rope_scaling_high_freq_factor:
        return plain
    if turns < s.rope_scaling_low_freq_factor:
        return plain / s.rope_scaling_factor
    smooth = (turns - s.rope_scaling_low_freq_factor) / (s.rope_scaling_high_freq_factor - s.rope_scaling_low_freq_factor)
    return (1 - smooth) * plain / s.rope_scaling_factor + smooth * plain


def rms_norm(x: Tensor, weight: Tensor, s: Settings) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + s.norm_epsilon).sqrt() * weight


def rotated(x: Tensor, positions: Tensor, s: Settings) -> Tensor:
    """x [n, heads, d]: adjacent channels are the real and imaginary part of a number that turns with the position."""
    angles = positions.double()[:, None, None] * torch.tensor([frequency(i, s) for i in range(s.kv_channels // 2)], dtype=torch.float64)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def attention(x: Tensor, positions: Tensor, w: dict[str, Tensor], layer: str, s: Settings) -> Tensor:
    q, k, v = ((x @ w[f"{layer}.attention.{name}.weight"].T).unflatten(-1, (-1, s.kv_channels)) for name in ("wq", "wk", "wv"))
    if s.qk_layernorm:
        q, k = (rms_norm(t, w[f"{layer}.attention.{name}.weight"], s) for t, name in ((q, "q_norm"), (k, "k_norm")))
    q, k = rotated(q, positions, s), rotated(k, positions, s)
    k, v = (t.repeat_interleave(s.num_attention_heads // s.num_query_groups, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(s.kv_channels)
    causal = torch.ones(len(x), len(x)).tril().bool()
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~causal, -math.inf).softmax(-1), v)
    return mixed.flatten(1) @ w[f"{layer}.attention.wo.weight"].T


def feed_forward(x: Tensor, w: dict[str, Tensor], layer: str) -> Tensor:
    w1, w2, w3 = (w[f"{layer}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def logits(tokens: Tensor, positions: Tensor, w: dict[str, Tensor], s: Settings) -> Tensor:
    """int64 [n] each, of one document -> [n, vocabulary]."""
    x = w["tok_embeddings.weight"][tokens]
    for number in range(s.num_layers):
        layer = f"layers.{number}"
        x = x + attention(rms_norm(x, w[f"{layer}.attention_norm.weight"], s), positions, w, layer, s)
        x = x + feed_forward(rms_norm(x, w[f"{layer}.ffn_norm.weight"], s), w, layer)
    return rms_norm(x, w["norm.weight"], s) @ w.get("output.weight", w["tok_embeddings.weight"]).T


# --- the step ---


def learning_rate(step: int, s: Settings) -> float:
    """Of optimizer step `step`, from 1: linear warm-up, then half a cosine down to `min_lr`, which holds."""
    if step <= s.lr_warmup_iters:
        return s.lr * step / s.lr_warmup_iters
    progress = min(1.0, (step - s.lr_warmup_iters) / (s.lr_decay_iters - s.lr_warmup_iters))
    return s.min_lr + (s.lr - s.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class Trainer:
    """`weights` and AdamW's moments by name, float64; `gradients` are those of the last step, before clipping."""

    def __init__(self, settings: Settings):
        self.settings, self.steps = settings, 0
        self.weights = initial_weights(settings)
        self.first, self.second = ({n: torch.zeros_like(w) for n, w in self.weights.items()} for _ in range(2))
        self.gradients: dict[str, Tensor] = {}

    def step(self, batch: list[Sequence]) -> tuple[float, float, float]:
        """Returns (loss, gradient norm, learning rate)."""
        s = self.settings
        loss = self._backward(batch)
        norm = math.sqrt(sum(float(g.square().sum()) for g in self.gradients.values()))
        scale = s.clip_grad / norm if 0 < s.clip_grad < norm else 1.0
        self.steps += 1
        rate = learning_rate(self.steps, s)
        for name in self.weights:
            self._adamw(name, self.gradients[name] * scale, rate)
        return loss, norm, rate

    def _backward(self, batch: list[Sequence]) -> float:
        """The mean over the targets of the whole batch that count, and its gradients."""
        leaves = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
        count, loss = max(1, sum(int(sequence.counts.sum()) for sequence in batch)), 0.0
        for sequence in batch:
            mean = -self._log_likelihood(sequence, leaves) / count
            mean.backward()
            loss += mean.item()
        self.gradients = {name: leaf.grad for name, leaf in leaves.items()}
        return loss

    def _log_likelihood(self, sequence: Sequence, weights: dict[str, Tensor]) -> Tensor:
        """Summed over the targets that count; each document alone."""
        borders = np.flatnonzero(np.diff(sequence.documents)) + 1 if self.settings.document_mask else []
        total = torch.zeros((), dtype=torch.float64)
        for tokens, targets, counts, _, positions in zip(*(np.split(array, borders) for array in sequence)):
            log_p = logits(torch.tensor(tokens), torch.tensor(positions), weights, self.settings).log_softmax(-1)
            total = total + log_p[torch.arange(len(targets)), torch.tensor(targets)][torch.tensor(counts)].sum()
        return total

    def _adamw(self, name: str, gradient: Tensor, rate: float) -> None:
        """Decoupled weight decay, of matrices only; moments without their bias towards 0."""
        s, weight = self.settings, self.weights[name]
        first = self.first[name] = s.adam_beta1 * self.first[name] + (1 - s.adam_beta1) * gradient
        second = self.second[name] = s.adam_beta2 * self.second[name] + (1 - s.adam_beta2) * gradient.square()
        decayed = weight if weight.ndim == 1 else weight * (1 - rate * s.weight_decay)
        direction = first / (1 - s.adam_beta1**self.steps) / ((second / (1 - s.adam_beta2**self.steps)).sqrt() + s.adam_eps)
        self.weights[name] = decayed - rate * direction
