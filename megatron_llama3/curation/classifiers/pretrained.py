"""A pretrained encoder with a new head, fine-tuned on the labels: the paper's own choice is DistilRoberta (3.1.1).

Any of Hugging Face's encoders for sequence classification will do, by the folder it lies in (or its name, where there is a network). It
needs transformers (the extra `convert`). The trained model is one file with all in it: what it was fine-tuned from may go.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.classifiers.model_file import save_classifier

_LONGEST = 512  # tokens of a text, from its start


@dataclass(frozen=True)
class PretrainedConfig:
    """labels: in the order of the outputs. model: transformers' configuration; tokenizer: the contents of a tokenizer.json."""

    labels: list[str]
    model: dict
    tokenizer: str
    pad_id: int
    max_tokens: int


class PretrainedClassifier:
    """Runs on the GPU where there is one."""

    def __init__(self, config: PretrainedConfig, model: nn.Module):
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.float().eval().to(self.device)
        self._tokenizer = Tokenizer.from_str(config.tokenizer)
        self._tokenizer.enable_truncation(config.max_tokens)
        self._tokenizer.enable_padding(pad_id=config.pad_id)

    @classmethod
    def train_on(
        cls, texts: Sequence[str], labels: Sequence[str], base: str, seed: int = 0, epochs: int = 2, lr: float = 3e-5, batch: int = 16
    ) -> "PretrainedClassifier":
        """Fits `base`, a folder of a pretrained encoder and its tokenizer, to texts and labels. Raises UserError where it is none."""
        names = sorted(set(labels))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            classifier = cls._untrained(base, names)
            classifier._fit(texts, torch.tensor([names.index(label) for label in labels]), epochs, lr, batch)
        return classifier

    @classmethod
    def _untrained(cls, base: str, names: list[str]) -> "PretrainedClassifier":
        try:
            tokenizer = AutoTokenizer.from_pretrained(base)
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names), ignore_mismatched_sizes=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--pretrained {base}: no encoder and tokenizer of Hugging Face's can be read from it ({reason})") from error
        if not tokenizer.is_fast or tokenizer.pad_token_id is None:
            raise UserError(f"--pretrained {base}: its tokenizer must have a tokenizer.json and a padding token")
        # RoBERTa's positions begin behind its padding id.
        positions = getattr(model.config, "max_position_embeddings", _LONGEST) - (tokenizer.pad_token_id + 1)
        longest = min(tokenizer.model_max_length, positions, _LONGEST)
        config = PretrainedConfig(names, model.config.to_dict(), tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token_id, longest)
        return cls(config, model)

    def _fit(self, texts: Sequence[str], targets: torch.Tensor, epochs: int, lr: float, batch: int) -> None:
        """AdamW on the cross entropy, its rate warmed up and down to 0; classes of unequal size weigh the same. targets: int64 [texts]."""
        classes = len(self.config.labels)
        class_weight = (len(targets) / (classes * torch.bincount(targets, minlength=classes).float())).to(self.device)
        optimizer = torch.optim.AdamW(self.model.train().parameters(), lr, weight_decay=0.01)
        steps = epochs * -(-len(targets) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
        with tqdm(total=steps, unit="step", disable=None, file=sys.stderr) as bar:
            for _ in range(epochs):
                for chosen in torch.randperm(len(targets)).split(batch):
                    logits = self._logits([texts[i] for i in chosen.tolist()])
                    loss = cross_entropy(logits, targets[chosen].to(self.device), weight=class_weight)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
        self.model.eval()

    def _logits(self, texts: Sequence[str]) -> torch.Tensor:
        """[texts, labels]."""
        encoded = self._tokenizer.encode_batch([text.encode("utf-8", "replace").decode() for text in texts])
        ids = torch.tensor([text.ids for text in encoded], device=self.device)
        mask = torch.tensor([text.attention_mask for text in encoded], device=self.device)
        return self.model(input_ids=ids, attention_mask=mask).logits

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """float [texts, labels]; rows sum to 1."""
        rows = [self._logits(texts[i : i + batch]).softmax(-1).cpu() for i in range(0, len(texts), batch)]
        return torch.cat(rows).numpy() if rows else np.zeros((0, len(self.config.labels)))

    def save(self, path: str | Path) -> None:
        save_classifier(path, "pretrained", asdict(self.config), {k: tensor.cpu().numpy() for k, tensor in self.model.state_dict().items()})

    @classmethod
    def from_arrays(cls, config: dict, arrays: dict[str, np.ndarray]) -> "PretrainedClassifier":
        """Raises RuntimeError where names or shapes do not fit."""
        config = PretrainedConfig(**config)
        options = {key: value for key, value in config.model.items() if key != "transformers_version"}
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**options))
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return cls(config, model)
