"""Openings of web pages and of encyclopedia articles, from the package evals: ordinary text for unlabelled training."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import EVALS
from probes.fit.sources.base import Source, SourceContext

_MEMBER = "evals/registry/data/schelling_point/{}_5.jsonl"
_OPENING = 64


class EvalsTexts(Source):
    """1,000 openings of OpenWebText pages and 1,000 of Wikipedia articles, of five sentences each, all label 0.

    The package holds each text eleven times: as it was, and with its sentences in ten other orders. All orders of a
    text are one group.
    """

    kind = "evals_texts"

    sets: Annotated[
        tuple[Literal["owt", "wikipedia"], ...], Field(min_length=1, strict=False, description="which of the two")
    ] = ("owt", "wikipedia")
    orders: Annotated[
        int, Field(ge=1, le=11, description="of each text: the first is its own; those that begin alike are left out")
    ] = 1

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(EVALS) as archive:
            for name in self.sets:
                lines = archive.read(_MEMBER.format(name)).decode("utf-8").splitlines()
                for number, line in enumerate(lines):
                    row = json.loads(line)
                    ordered = [str(row[key]).strip() for key in sorted(row, key=int)]
                    for text in _different_openings(ordered)[: self.orders]:
                        group = f"{self.kind}/{name}/{number}"
                        examples.append(Example(text=text, label=0, source=f"{self.kind}/{name}", group=group))
        return examples


def _different_openings(texts: list[str]) -> list[str]:
    """The first of all texts that begin alike."""
    first: dict[str, str] = {}
    for text in texts:
        if text:
            first.setdefault(text[:_OPENING], text)
    return list(first.values())
