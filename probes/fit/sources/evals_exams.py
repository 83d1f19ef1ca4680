"""Questions of school exams in five languages, from the package evals: text for unlabelled training."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field

from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import EVALS
from probes.fit.sources.base import Source, SourceContext

_MEMBER = "evals/registry/data/{}-exams-qa/samples.jsonl"
_CODES = {"french": "fr", "german": "de", "italian": "it", "portuguese": "pt", "spanish": "es"}


class EvalsExams(Source):
    """Multiple-choice questions with their choices, label 0; each is a group, ``language`` says in which it is."""

    kind = "evals_exams"

    languages: Annotated[
        tuple[Literal["french", "german", "italian", "portuguese", "spanish"], ...], Field(min_length=1, strict=False)
    ] = ("french", "german", "italian", "portuguese", "spanish")

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(EVALS) as archive:
            for language in self.languages:
                for line in archive.read(_MEMBER.format(language)).decode("utf-8").splitlines():
                    messages = json.loads(line)["input"]
                    text = "\n".join(m["content"] for m in messages if m["role"] == "user").strip()
                    if text:
                        examples.append(
                            Example(
                                text=text,
                                label=0,
                                source=f"{self.kind}/{language}",
                                group=f"{self.kind}/{text_digest(text)[:12]}",
                                language=_CODES[language],
                            )
                        )
        return examples
