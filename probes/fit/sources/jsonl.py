"""A user's own set: one JSON object a line, with a text or messages, perhaps a response, and a label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from probes.fit.rows.example import Example, text_digest
from probes.fit.sources.base import Source, SourceContext, SourceError


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: Annotated[str | None, Field(min_length=1)] = None
    prompt: Annotated[str | None, Field(min_length=1)] = None
    messages: Annotated[list[_Message] | None, Field(min_length=1)] = None
    response: Annotated[str | None, Field(min_length=1)] = None
    label: Literal[0, 1] | None = None
    source: str | None = None
    group: str | None = None
    lang: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{0,35}$")] = ""
    onset: Annotated[int | None, Field(ge=0)] = None

    @model_validator(mode="after")
    def _one_prompt_and_one_response(self) -> _Row:
        if sum(part is not None for part in (self.text, self.prompt, self.messages)) != 1:
            raise ValueError("exactly one of 'text', 'prompt' and 'messages' is needed")
        if self.messages is not None and self.messages[-1].role == "assistant":
            if self.response is not None:
                raise ValueError("the messages end with the assistant's, which is the response: leave 'response' out")
            if len(self.messages) == 1:
                raise ValueError("a message of the assistant answers nothing: begin with what it answers")
        elif self.onset is not None and self.response is None:
            raise ValueError("'onset' counts the characters of a response, and there is none")
        return self


class Jsonl(Source):
    """``{"text": ..., "label": 0|1, "source": ..., "group": ...}``, a line each.

    In the place of ``text`` there may be ``prompt``, which is the same, or ``messages``. A ``response`` beside them, or
    a last message of the assistant, is the reply that is judged. ``lang`` (such as ``en``) and ``onset``, the character
    of the reply from which on it is what the label says, are for evaluations.
    """

    kind = "jsonl"

    path: Annotated[str, Field(min_length=1, description="file, relative to the recipe")]
    label: Annotated[Literal[0, 1] | None, Field(description="label of rows that have none of their own")] = None

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        return read_jsonl(context.folder / self.path, label=self.label, name=self.path)


def read_jsonl(path: Path, *, label: int | None = None, name: str | None = None) -> list[Example]:
    """The rows of a file; see ``Jsonl``.

    Args:
        path: of the file.
        label: of rows that have none of their own; None: they must have one.
        name: source of rows that name none; the file's name if None.
    Raises:
        SourceError: the file cannot be read, or a row is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other line ends may stand inside a text
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read ({error.strerror}). A JSONL file is needed here: correct the path."
        ) from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    return [
        _example(line, f"{path}:{number}", label, name or path.name)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _example(line: str, where: str, default: int | None, name: str) -> Example:
    try:
        row = _Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the row"
        raise SourceError(
            f"{where}: {field}: {first['msg']}. A row is {json.dumps({'text': '...', 'label': 0})} or has "
            "'messages' in the place of 'text'; 'response', 'source', 'group', 'lang' and 'onset' are optional. "
            "Correct this line."
        ) from error
    label = default if row.label is None else row.label
    if label is None:
        raise SourceError(
            f"{where}: no label. Give the row a 'label' of 0 or 1 (in a recipe, the source may have one for all rows)."
        )
    turns = tuple((message.role, message.content) for message in row.messages or [])
    response = row.response or ""
    if turns and turns[-1][0] == "assistant":
        turns, response = turns[:-1], turns[-1][1]
    text = turns[-1][1] if turns else row.text or row.prompt or ""
    source = row.source or name
    group = row.group or f"{source}/{text_digest(text)[:12]}"
    return Example(
        text=text,
        label=label,
        source=source,
        group=group,
        turns=turns,
        response=response,
        language=row.lang,
        onset=row.onset,
    )
