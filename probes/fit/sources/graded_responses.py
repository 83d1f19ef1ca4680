"""Replies of language models that people graded for harm, from the package pyrit."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import PYRIT
from probes.fit.sources.base import Source, SourceContext

_FOLDERS = ("pyrit/datasets/scorer_evals/harm/", "pyrit/datasets/scorer_evals/objective/")
_HARMFUL = 0.5
"""Mean of the graders' scores, each from 0 to 1, from which on a reply counts as harmful."""


class GradedResponses(Source):
    """About 1,150 replies to harmful and borderline requests; all replies to one request are a group."""

    kind = "graded_responses"

    max_characters: Annotated[int, Field(ge=100, description="longer replies are left out")] = 1500

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(PYRIT) as archive:
            names = sorted(name for name in archive.namelist() if name.startswith(_FOLDERS) and name.endswith(".csv"))
            return [example for name in names for example in self._examples(archive, name)]

    def _examples(self, archive: zipfile.ZipFile, name: str) -> Iterator[Example]:
        # The first line is a comment; text with line breaks stands in quotes.
        _, _, table = archive.read(name).decode("utf-8-sig").partition("\n")
        for row in csv.DictReader(io.StringIO(table)):
            grades = [float(value) for key, value in row.items() if key and key.startswith("human_score") and value]
            request, reply = (row["objective"] or "").strip(), (row["assistant_response"] or "").strip()
            fits = bool(request) and 0 < len(reply) <= self.max_characters
            if grades and fits and row["data_type"] == "text":
                yield Example(
                    text=request,
                    label=int(sum(grades) / len(grades) >= _HARMFUL),
                    source=self.kind,
                    group=f"{self.kind}/{text_digest(request)[:12]}",
                    response=reply,
                )
