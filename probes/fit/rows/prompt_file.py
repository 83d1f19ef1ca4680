"""A file of prompts, conversations and replies, one JSON object a line, of any size; knows no model and no engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from probes.errors import TelltaleError

__all__ = ["PromptFile", "PromptFileError", "PromptLine"]

_FORM = '{"text": ...}, {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}]}'


class PromptFileError(TelltaleError, ValueError):
    """A file of prompts cannot be read, or one of its lines cannot be used."""


class _Message(BaseModel):
    # What else a message may hold (tool_calls, name, ...) is for the chat template.
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.model_extra or {}).get("tool_calls"):
            raise ValueError("a message has a 'content'; only one with 'tool_calls' can do without")
        return self


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    text: Annotated[str | None, Field(min_length=1)] = None
    prompt: Annotated[str | None, Field(min_length=1)] = None
    messages: Annotated[list[_Message] | None, Field(min_length=1)] = None
    response: Annotated[str | None, Field(min_length=1)] = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [name for name in ("text", "prompt", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of 'text', 'prompt' and 'messages' is needed, not {given or 'none of them'}")
        if self.messages is not None and self.messages[-1].role == "assistant":
            if self.response is not None:
                raise ValueError("the reply stands twice: as 'response' and as the last message")
            if len(self.messages) == 1 or not self.messages[-1].content:
                raise ValueError("a reply at the end of a conversation says something, and has a prompt before it")
        return self


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One line.

    Attributes:
        number: of the line in the file, from 1.
        messages: the prompt as the chat API takes it.
        text: the prompt as it is, without roles; None where the line holds a conversation.
        response: what the assistant replied to it; None where the line holds no reply.
        fields: all other keys of the line, such as ``label``, ``source``, ``group`` and ``id``.
    """

    number: int
    messages: tuple[Mapping[str, Any], ...]
    text: str | None
    response: str | None
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file whose lines have all been looked at.

    Attributes:
        path: of the file.
        digest: SHA-256 of its bytes, hexadecimal.
        count: lines that are not blank.
    """

    path: Path
    digest: str
    count: int

    @classmethod
    def open(cls, path: Path, *, require: Callable[[PromptLine], str | None] = lambda line: None) -> Self:
        """Read every line once and keep none of them.

        Args:
            path: of the file.
            require: says what is wrong with a line, for this use of it; None if nothing is.
        Raises:
            PromptFileError: the file cannot be read or is empty, or a line is wrong; names the line.
        """
        digest, count = hashlib.sha256(), 0
        for number, data in _numbered(path):
            digest.update(data)
            if data.strip():
                line = _parse(data, path, number)
                problem = require(line)
                if problem is not None:
                    raise PromptFileError(f"{path}:{number}: {problem} Correct this line, or leave it out.")
                count += 1
        if not count:
            raise PromptFileError(f"{path}: holds no line. Each line is one of {_FORM}.")
        return cls(path, digest.hexdigest(), count)

    def lines(self, first: int = 0) -> Iterator[PromptLine]:
        """The lines that are not blank, in order, one at a time.

        Args:
            first: how many of them to leave out at the beginning.
        Raises:
            PromptFileError: the file has changed meanwhile, so that it cannot be read.
        """
        seen = 0
        for number, data in _numbered(self.path):
            if data.strip():
                if seen >= first:
                    yield _parse(data, self.path, number)
                seen += 1


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    # As bytes: text mode and str.splitlines() also end lines at characters that JSON strings may hold.
    try:
        with path.open("rb") as handle:
            yield from enumerate(handle, 1)
    except OSError as error:
        raise PromptFileError(
            f"{path}: cannot be read ({error.strerror}). Name a file of JSON lines, each one of {_FORM}."
        ) from error


def _parse(data: bytes, path: Path, number: int) -> PromptLine:
    try:
        line = _Line.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        what = f"{field}: {first['msg']}" if field else first["msg"]
        raise PromptFileError(
            f"{path}:{number}: {what}. A line is one of {_FORM}; other keys are kept. Correct this line."
        ) from error
    text = line.text if line.text is not None else line.prompt
    messages = [message.model_dump(exclude_unset=True) for message in line.messages or []]
    response = line.response
    if messages and messages[-1]["role"] == "assistant":
        response = messages.pop()["content"]
    if text is not None:
        messages = [{"role": "user", "content": text}]
    return PromptLine(number, tuple(messages), text, response, MappingProxyType(line.model_extra or {}))
