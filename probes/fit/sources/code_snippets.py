"""Our own pieces of program code and prose about programs, generated with the recipe's seed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.generated.code_snippets import draw_prose, draw_snippets
from probes.fit.rows.example import Example, text_digest
from probes.fit.sources.base import Source, SourceContext


class CodeSnippets(Source):
    """Code (label 1; a programming language is a group) and prose (label 0; a template is a group)."""

    kind = "code_snippets"

    rows_per_label: Annotated[int, Field(ge=1, le=2000, description="how many of each label to draw")] = 400

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        rng = context.rng(self.kind)
        code = [
            Example(text=text, label=1, source=self.kind, group=f"{self.kind}/{language}")
            for text, language in draw_snippets(self.rows_per_label, rng)
        ]
        prose = [
            Example(text=text, label=0, source=self.kind, group=f"{self.kind}/{text_digest(form)[:12]}")
            for text, form in draw_prose(self.rows_per_label, rng)
        ]
        return [*code, *prose]
