"""Pieces of the package evals' own Python files: code that people wrote, for unlabelled training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import EVALS
from probes.fit.sources.base import Source, SourceContext


class EvalsCode(Source):
    """Consecutive lines of about 350 Python files, label 0; a file is a group."""

    kind = "evals_code"

    lines: Annotated[int, Field(ge=1, description="of a piece, at most")] = 24

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(EVALS) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".py")):
                lines = archive.read(name).decode("utf-8").splitlines()
                for start in range(0, len(lines), self.lines):
                    text = "\n".join(lines[start : start + self.lines]).strip("\n")
                    if text.strip():
                        examples.append(Example(text=text, label=0, source=self.kind, group=f"{self.kind}/{name}"))
        return examples
