"""A user's own set: one JSON object a line, with a text or messages, and a label."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from probes.fit.example import Example, text_digest
from probes.fit.sources.base import Source, SourceContext, SourceError


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: Annotated[str | None, Field(min_length=1)] = None
    messages: Annotated[list[_Message] | None, Field(min_length=1)] = None
    label: Literal[0, 1] | None = None
    source: str | None = None
    group: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> _Row:
        if (self.text is None) == (self.messages is None):
            raise ValueError("exactly one of 'text' and 'messages' is needed")
        return self


class Jsonl(Source):
    """``{"text": ..., "label": 0|1, "source": ..., "group": ...}`` or ``{"messages": [...], "label": ...}``."""

    kind = "jsonl"

    path: Annotated[str, Field(min_length=1, description="file, relative to the recipe")]
    label: Annotated[Literal[0, 1] | None, Field(description="label of rows that have none of their own")] = None

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        path = context.folder / self.path
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise SourceError(
                f"{path}: cannot be read ({error.strerror}). A JSONL file is needed here: correct 'path' in the recipe."
            ) from error
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
        return [self._example(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]

    def _example(self, line: str, where: str) -> Example:
        try:
            row = _Row.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the row"
            raise SourceError(
                f"{where}: {field}: {first['msg']}. A row is {json.dumps({'text': '...', 'label': 0})} or has "
                "'messages' in the place of 'text'; 'source' and 'group' are optional. Correct this line."
            ) from error
        label = self.label if row.label is None else row.label
        if label is None:
            raise SourceError(f"{where}: no label. Give the row a 'label' of 0 or 1, or the source in the recipe one.")
        turns = tuple((message.role, message.content) for message in row.messages or [])
        text = row.text if row.text is not None else turns[-1][1]
        source = row.source or self.path
        group = row.group or f"{source}/{text_digest(text)[:12]}"
        return Example(text=text, label=label, source=source, group=group, turns=turns)
