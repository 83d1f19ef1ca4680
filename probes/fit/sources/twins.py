"""Our own harmless twins of harmful requests, generated with the recipe's seed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.generated.twins import make_twins
from probes.fit.rows.example import Example, text_digest
from probes.fit.sources.base import Source, SourceContext


class BenignTwins(Source):
    """Requests with the form and the trigger words of harmful ones, all harmless; those of one topic are a group."""

    kind = "benign_twins"

    rows: Annotated[int, Field(ge=1, le=5000, description="how many to draw")] = 2000

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        twins = make_twins(self.rows, context.rng(self.kind))
        return [
            Example(text=twin.text, label=0, source=self.kind, group=f"{self.kind}/{text_digest(twin.topic)[:12]}")
            for twin in twins
        ]
