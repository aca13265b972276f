"""A small bidirectional transformer over hashed words, trained from nothing: words within a text see each other, as in no bag of words.

It needs no download and trains in about a minute on a CPU. Knowledge of language it has none: see `pretrained_classifier`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from megatron_llama3.curation.classifiers.fit import fit
from megatron_llama3.curation.classifiers.model_file import save_classifier
from megatron_llama3.curation.text.words import ngram_hashes, split_words, word_hashes

_PADDING = 0
_LINEAR_RATE = 10


@dataclass(frozen=True)
class EncoderConfig:
    """labels: in the order of the outputs. A text is cut to `max_words`; words fall into `buckets`, bucket 0 being padding."""

    labels: list[str]
    buckets: int = 1 << 15
    max_words: int = 192
    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1


class EncoderClassifier(nn.Module):
    """Embeddings of words, pairs and positions, transformer layers with norms before, the mean over the words, a linear layer; and beside
    them a weight for each word and pair, as in the linear model, which a few hundred texts are enough to train."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.buckets, config.width, padding_idx=_PADDING)
        self.pairs = nn.Embedding(config.buckets, config.width, padding_idx=_PADDING)
        self.positions = nn.Embedding(config.max_words, config.width)
        self.linear_words, self.linear_pairs = (nn.Embedding(config.buckets, len(config.labels), padding_idx=_PADDING) for _ in range(2))
        for table in (self.linear_words, self.linear_pairs):
            nn.init.zeros_(table.weight)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, config.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.layers, norm=nn.LayerNorm(config.width), enable_nested_tensor=False)
        self.output = nn.Linear(config.width, len(config.labels))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, words, 2], padded with 0. Returns logits [batch, labels]."""
        words, pairs = ids.unbind(-1)
        padding = words == _PADDING
        count = (~padding).sum(1, keepdim=True)
        hidden = self.words(words) + self.pairs(pairs) + self.positions.weight[: words.shape[1]]
        hidden = self.encoder(hidden, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)
        linear = self.linear_words(words) + self.linear_pairs(pairs)
        return self.output(hidden.sum(1) / count) + linear.sum(1) / count.sqrt()

    def ids(self, text: str) -> torch.Tensor:
        """int64 [1 to max_words, 2]: a word's bucket, and that of the word with the next (0 behind the last). No words: one 1."""
        words = word_hashes(split_words(text)[: self.config.max_words])
        if not len(words):
            return torch.tensor([[1, _PADDING]])
        pairs = np.append(self._buckets(ngram_hashes(words, 2)), _PADDING)
        return torch.from_numpy(np.stack([self._buckets(words), pairs], axis=-1))

    def _buckets(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes % np.uint64(self.config.buckets - 1)).astype(np.int64) + 1

    @classmethod
    def train_on(
        cls, texts: Sequence[str], labels: Sequence[str], seed: int = 0, epochs: int = 6, lr: float = 1e-3, batch: int = 32, **config
    ) -> "EncoderClassifier":
        """Fits texts to their labels; classes of unequal size weigh the same."""
        names = sorted(set(labels))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(EncoderConfig(names, **config))
            ids = [model.ids(text) for text in texts]
            tables = [model.linear_words.weight, model.linear_pairs.weight]
            others = [parameter for parameter in model.parameters() if all(parameter is not table for table in tables)]
            rates = [lr, _LINEAR_RATE * lr]  # a weight of the tables sees few of the texts
            parameters = [{"params": group, "lr": rate} for group, rate in zip((others, tables), rates)]
            fit(model, lambda chosen: model(_padded([ids[i] for i in chosen])), parameters, labels, epochs, batch)
        return model.eval()

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """float [texts, labels]; rows sum to 1."""
        ids = [self.ids(text) for text in texts]
        rows = [self(_padded(ids[i : i + batch])).softmax(-1) for i in range(0, len(ids), batch)]
        return torch.cat(rows).numpy() if rows else np.zeros((0, len(self.config.labels)))

    def save(self, path: str | Path) -> None:
        save_classifier(path, "encoder", asdict(self.config), {name: tensor.numpy() for name, tensor in self.state_dict().items()})

    @classmethod
    def from_arrays(cls, config: dict, arrays: dict[str, np.ndarray]) -> "EncoderClassifier":
        """Raises RuntimeError where names or shapes do not fit."""
        model = cls(EncoderConfig(**config))
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return model.eval()


def _padded(ids: list[torch.Tensor]) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=_PADDING)
