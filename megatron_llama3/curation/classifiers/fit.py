"""The training loop of the encoders."""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm


def fit(
    model: nn.Module,
    logits_of: Callable[[list[int]], torch.Tensor],
    parameters: list[dict],
    labels: Sequence[str],
    epochs: int,
    batch: int,
) -> None:
    """AdamW on the cross entropy, its rates warmed up and down; classes of unequal size weigh the same.

    logits_of: [texts, classes] of the texts of those numbers, classes in the order of their names. parameters: groups with `lr`, the peak.
    """
    names = sorted(set(labels))
    targets = torch.tensor([names.index(label) for label in labels])
    class_weight = len(targets) / (len(names) * torch.bincount(targets, minlength=len(names)).float())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    steps = epochs * -(-len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in parameters], total_steps=steps + 1)
    with tqdm(total=steps, unit="step", disable=None, file=sys.stderr) as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(targets)).split(batch):
                logits = logits_of(chosen.tolist())
                loss = cross_entropy(logits, targets[chosen].to(logits.device), weight=class_weight.to(logits.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
