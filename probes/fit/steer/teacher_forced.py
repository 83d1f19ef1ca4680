"""Given texts through a model, again and again, steered in different ways: the layers below the steer run once.

It gives log-probabilities; what they mean is for others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from probes.fit.reading.padded import Padded, batches_by_length, left_padded
from probes.fit.steer.steered_model import SteeredModel
from probes.fit.steer.writes import Writes

__all__ = ["Line", "TeacherForced"]

_ROWS_PER_BATCH = 32


@dataclass(frozen=True, slots=True)
class Line:
    """A sequence, and which of its predictions are looked at: those of all tokens from ``first`` on.

    Attributes:
        tokens: at least ``first`` + 1.
        num_prompt: how many are the prompt; a steer of generated rows begins behind them.
        first: at least 1; the first token whose prediction is looked at, by the row before it.
    """

    tokens: tuple[int, ...]
    num_prompt: int
    first: int


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    numbers: list[int]
    padded: Padded
    stream: torch.Tensor
    keep: int


class TeacherForced:
    """Lines whose stream after one layer is kept.

    Args:
        model: of all.
        lines: in any order.
        layer: after which every steer writes.
    """

    def __init__(self, model: SteeredModel, lines: Sequence[Line], *, layer: int) -> None:
        self._model = model
        self._layer = layer
        self.lines = tuple(lines)
        self._batches: list[_Batch] = []
        for numbers in batches_by_length([line.tokens for line in lines], _ROWS_PER_BATCH):
            padded = left_padded([lines[i].tokens for i in numbers])
            # One row more than there are predictions: the last row predicts what is not there.
            keep = max(len(lines[i].tokens) - lines[i].first for i in numbers) + 1
            self._batches.append(_Batch(numbers, padded, model.stream(padded, layer), keep))
        self._can_resume = bool(self._batches) and self._resumes(self._batches[0])

    def predictions(self, steer: Writes | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Each line's number, and its log-probabilities: (looked at, vocabulary) float32.

        Args:
            steer: what is written; it must write after the layer of this object.
        """
        for batch in self._batches:
            with self._model.resumed(self._layer, batch.stream) if self._can_resume else nullcontext():
                logits = self._model.logits(
                    batch.padded,
                    steer=steer,
                    num_prompts=[self.lines[i].num_prompt for i in batch.numbers],
                    keep=batch.keep,
                )
            for place, number in enumerate(batch.numbers):
                line = self.lines[number]
                own = logits[place, -1 - (len(line.tokens) - line.first) : -1]
                yield number, torch.log_softmax(own, dim=-1)

    def _resumes(self, batch: _Batch) -> bool:
        """Whether the stream is all that the upper layers take from the lower ones; else these must run each time."""
        num_prompts = [0] * len(batch.numbers)
        whole = self._model.logits(batch.padded, steer=None, num_prompts=num_prompts, keep=1)
        with self._model.resumed(self._layer, batch.stream):
            resumed = self._model.logits(batch.padded, steer=None, num_prompts=num_prompts, keep=1)
        return torch.allclose(whole, resumed, rtol=1e-4, atol=1e-4)

    def of_tokens(self, steer: Writes | None) -> list[torch.Tensor]:
        """For each line the log-probabilities of its own tokens from ``first`` on: (looked at,) float64."""
        found: dict[int, torch.Tensor] = {}
        for number, predicted in self.predictions(steer):
            line = self.lines[number]
            index = torch.tensor(line.tokens[line.first :])[:, None]
            found[number] = predicted.gather(1, index)[:, 0].double()
        return [found[number] for number in range(len(self.lines))]
