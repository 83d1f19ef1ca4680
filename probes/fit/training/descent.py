"""Fits the parameters of a probe over token sequences by gradient descent; knows no kind of probe."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from probes.fit.reading.sequences import Sequences
from probes.fit.training.linear_probe import Float64, Labels

__all__ = ["Descent", "descend", "statistics_by"]

_BATCH = 64
_HELD_OUT = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """How to descend: Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    Attributes:
        learning_rate: of Adam.
        weight_decay: of AdamW.
        epochs: at most; the best one by the held-out loss counts.
        patience: epochs without a lower held-out loss, after which it ends.
        seed: of the order of the batches, and of who is held out.
    """

    learning_rate: float
    weight_decay: float
    epochs: int
    patience: int
    seed: int


def descend(module: torch.nn.Module, sequences: Sequences, labels: Labels, settings: Descent) -> None:
    """Fit in place. Both classes weigh alike, whatever their counts.

    Of each class 15 % of the requests (at least one) are held out to say when to stop.

    Args:
        module: maps (b, T, d_model) and (b, T) to (b,) logits.
        sequences: n requests.
        labels: (n,), 0 or 1, both present at least twice.
        settings: how.
    """
    rng = np.random.default_rng(settings.seed)
    kept, held = _split(labels, rng)
    weights = torch.tensor(np.where(labels == 1, 0.5 / np.mean(labels == 1), 0.5 / np.mean(labels == 0)))
    truth = torch.tensor(labels, dtype=torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, waited = float("inf"), 0
    state = copy.deepcopy(module.state_dict())

    def loss_of(index: npt.NDArray[np.int64]) -> torch.Tensor:
        logits = module(*sequences.padded(index))
        return binary_cross_entropy_with_logits(logits, truth[index], weight=weights[index].float())

    for _ in range(settings.epochs):
        module.train()
        for index in _batches(sequences.lengths, kept, rng):
            optimizer.zero_grad()
            loss_of(index).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        module.eval()
        with torch.inference_mode():
            batches = list(_batches(sequences.lengths, held, rng))
            loss = sum(float(loss_of(index)) * len(index) for index in batches) / len(held)
        if loss < best:
            best, waited, state = loss, 0, copy.deepcopy(module.state_dict())
        elif (waited := waited + 1) > settings.patience:
            break
    module.load_state_dict(state)


def statistics_by(module: torch.nn.Module, sequences: Sequences) -> Float64:
    """(n,) what a module says of each request."""
    found = np.empty(len(sequences))
    with torch.inference_mode():
        for index in _batches(sequences.lengths, np.arange(len(sequences)), np.random.default_rng(0)):
            found[index] = module(*sequences.padded(index)).numpy()
    return found


def _split(labels: Labels, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    held = []
    for label in (0, 1):
        own = rng.permutation(np.flatnonzero(labels == label))
        held.append(own[: max(1, round(_HELD_OUT * len(own)))])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def _batches(
    lengths: npt.NDArray[np.int64], index: npt.NDArray[np.int64], rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Requests of like length together, so that little is padded; the batches in any order."""
    shuffled = rng.permutation(index)
    ordered = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    batches = [ordered[start : start + _BATCH] for start in range(0, len(ordered), _BATCH)]
    return [batches[i] for i in rng.permutation(len(batches))]
