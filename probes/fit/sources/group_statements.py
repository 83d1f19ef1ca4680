"""Our own hostile and harmless statements about the same groups of people, generated with the recipe's seed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.generated.group_statements import draw_statements
from probes.fit.rows.example import Example, text_digest
from probes.fit.sources.base import Source, SourceContext


class GroupStatements(Source):
    """As many statements of each label as asked for; those of one template are a group."""

    kind = "group_statements"

    rows_per_label: Annotated[int, Field(ge=1, le=1000, description="how many of each label to draw")] = 600

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        return [
            Example(
                text=statement.text,
                label=int(statement.hostile),
                source=self.kind,
                group=f"{self.kind}/{text_digest(statement.form)[:12]}",
            )
            for statement in draw_statements(self.rows_per_label, context.rng(self.kind))
        ]
