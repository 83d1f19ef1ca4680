"""Messages with made-up personal data, and the same messages without any, from templates in presidio-evaluator."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from probes.fit.generated.pii_fillers import HARMLESS, NEUTRAL, PERSONAL, Fill
from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import PRESIDIO_EVALUATOR
from probes.fit.sources.base import Source, SourceContext, SourceError

_MEMBER = "presidio_evaluator/data_generator/raw_data/templates.txt"
_SLOT = re.compile(r"\{\{\s*(\w+)\s*\}\}|\[([A-Z_]+)\]")


class PiiTemplates(Source):
    """Every template filled several times with personal data (label 1) and without (label 0); a template is a group.

    Templates that have no slot for personal data give rows with label 0 alone.
    """

    kind = "pii_templates"

    fillings: Annotated[int, Field(ge=1, le=20, description="of each template, for each label")] = 3
    max_characters: Annotated[int, Field(ge=20, description="longer templates are left out")] = 250

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(PRESIDIO_EVALUATOR) as archive:
            lines = archive.read(_MEMBER).decode("utf-8", errors="replace").splitlines()
        whole = [line.strip().replace("\\n", "\n") for line in dict.fromkeys(lines)]
        templates = [template for template in whole if 0 < len(template) <= self.max_characters]
        rng = context.rng(self.kind)
        return [example for template in templates for example in self._examples(template, rng)]

    def _examples(self, template: str, rng: random.Random) -> list[Example]:
        slots = {_name(match) for match in _SLOT.finditer(template)}
        if unknown := slots - PERSONAL.keys() - NEUTRAL.keys():
            raise SourceError(
                f"{_MEMBER}: slots {sorted(unknown)} are not known. Name a filling for them in "
                "probes/fit/generated/pii_fillers.py."
            )
        labels = (0, 1) if slots & PERSONAL.keys() else (0,)
        group = f"{self.kind}/{text_digest(template)[:12]}"
        return [
            Example(
                text=_filled(template, PERSONAL if label else HARMLESS, rng), label=label, source=self.kind, group=group
            )
            for _ in range(self.fillings)
            for label in labels
        ]


def _name(match: re.Match[str]) -> str:
    return (match[1] or match[2]).lower()


def _filled(template: str, fills: Mapping[str, Fill], rng: random.Random) -> str:
    both = {**NEUTRAL, **fills}
    return _SLOT.sub(lambda match: both[_name(match)](rng), template)
