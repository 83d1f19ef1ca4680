"""The fixed corpus of ordinary text that gives steering its units: norms and components of rows that nobody steers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probes.card import Format
from probes.fit.reading.activations import ActivationReader
from probes.fit.rows.example import Example
from probes.steering.base import Float64

__all__ = ["Ordinary", "corpus_digest", "ordinary_lines", "read_ordinary"]

_FILE = Path(__file__).with_name("ordinary.txt")
_CEILING = 99
"""Percentile of a component that ordinary rows seldom exceed."""


@dataclass(frozen=True, slots=True)
class Ordinary:
    """Rows of ordinary text after one layer, sinks left out.

    Attributes:
        rows: (n, d_model) float64; half of the corpus as it is, half as chats.
        skip_first: leading positions with a sink's norm.
    """

    rows: Float64
    skip_first: int

    @property
    def median_norm(self) -> float:
        """Of the rows."""
        return float(np.median(np.linalg.norm(self.rows, axis=1)))

    def mean(self, direction: Float64) -> float:
        """Mean component along a direction of length 1."""
        return float((self.rows @ direction).mean())

    def ceiling(self, direction: Float64) -> float:
        """The component that one row in a hundred exceeds."""
        return float(np.percentile(self.rows @ direction, _CEILING))


def corpus_digest() -> str:
    """SHA-256 of the corpus."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()


def ordinary_lines() -> list[str]:
    """The corpus, one text a line."""
    return _FILE.read_text(encoding="utf-8").splitlines()


def read_ordinary(reader: ActivationReader, layer: int) -> Ordinary:
    """The corpus through a model.

    Args:
        reader: of the model; it must read the layer.
        layer: whose output is taken.
    """
    examples = [Example(text=line, label=0, source="ordinary", group=line) for line in ordinary_lines()]
    skip_first = max(reader.sink_positions(examples[:16], text_format) for text_format in Format)
    found = []
    for number, example in enumerate(examples):
        tokens = reader.tokens(example, Format.CHAT if number % 2 else Format.RAW)
        found.append(reader.stream(tokens)[layer][skip_first:].astype(np.float64))
    return Ordinary(np.concatenate(found), skip_first)
