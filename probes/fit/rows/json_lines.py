"""A file of JSON lines, each of a stated form; knows no form itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from probes.errors import TelltaleError

__all__ = ["Numbered", "read_json_lines"]

L = TypeVar("L", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Numbered(Generic[L]):
    """A line, and its number in the file, from 1."""

    number: int
    line: L


def read_json_lines(
    path: Path, adapter: TypeAdapter[L], *, form: str, error: type[TelltaleError]
) -> Iterator[Numbered[L]]:
    """All lines that are not blank.

    Args:
        path: of the file.
        adapter: what a line is.
        form: the same for people: what stands in the message about a wrong line.
        error: what is raised.
    Raises:
        error: the file cannot be read, or a line is of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read ({problem}). Pass a file of JSON lines.") from problem
    for number, text in enumerate(lines, 1):
        if text.strip():
            try:
                yield Numbered(number, adapter.validate_json(text))
            except ValidationError as problem:
                raise error(f"{path}:{number}: not of the form {form}. Correct this line.") from problem
