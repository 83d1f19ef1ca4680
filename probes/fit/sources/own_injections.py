"""Our own prompt injections and harmless requests with the same words, generated with the recipe's seed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.generated.injection_twins import draw_injection_twins
from probes.fit.generated.injections import draw_injections
from probes.fit.rows.example import Example, text_digest
from probes.fit.sources.base import Source, SourceContext


class OwnInjections(Source):
    """Injections (label 1) beside requests that speak of instructions, rules and systems (label 0).

    Those of one template are a group.
    """

    kind = "own_injections"

    rows_per_label: Annotated[int, Field(ge=1, le=700, description="how many of each label to draw")] = 500

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        rng = context.rng(self.kind)
        drawn = {1: draw_injections(self.rows_per_label, rng), 0: draw_injection_twins(self.rows_per_label, rng)}
        return [
            Example(text=text, label=label, source=self.kind, group=f"{self.kind}/{text_digest(form)[:12]}")
            for label, rows in drawn.items()
            for text, form in rows
        ]
