"""Our own harmless requests with the words of prompt injections, generated with the recipe's seed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.example import Example, text_digest
from probes.fit.generated.injection_twins import draw_injection_twins
from probes.fit.sources.base import Source, SourceContext


class InjectionTwins(Source):
    """Requests that speak of instructions, rules, systems and prompts, all harmless; one template is a group."""

    kind = "injection_twins"

    rows: Annotated[int, Field(ge=1, le=700, description="how many to draw")] = 500

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        return [
            Example(text=text, label=0, source=self.kind, group=f"{self.kind}/{text_digest(form)[:12]}")
            for text, form in draw_injection_twins(self.rows, context.rng(self.kind))
        ]
