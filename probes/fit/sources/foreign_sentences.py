"""Our own everyday sentences in five languages beside their English translations, with the recipe's seed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.generated.aligned_sentences import draw_aligned
from probes.fit.rows.example import Example
from probes.fit.sources.base import Source, SourceContext


class ForeignSentences(Source):
    """German, French, Spanish, Italian and Portuguese (label 1) beside English (label 0).

    A language is a group: held out as a whole. Of the English rows a sentence is a group.
    """

    kind = "foreign_sentences"

    rows_per_language: Annotated[int, Field(ge=1, le=1000, description="texts in each of the five languages")] = 100

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        return [
            Example(
                text=sentence.text,
                label=int(sentence.language != "en"),
                source=self.kind,
                group=f"{self.kind}/{sentence.meaning if sentence.language == 'en' else sentence.language}",
            )
            for sentence in draw_aligned(self.rows_per_language, context.rng(self.kind))
        ]
