"""Cases: scores of requests, token by token, and what a policy is expected to do about them. Data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from monitor.strict import DetectorName, Name, Strict
from monitor.types import Action, Role
from probes.card import Format, Stage
from probes.errors import TelltaleError

Score = Annotated[float, Field(allow_inf_nan=False)]
Row = Score | Annotated[tuple[Score, ...], Field(min_length=1)]
"""Of one token: one number, or as many as the detector gives its aggregate."""


class CaseError(TelltaleError, ValueError):
    """Cases cannot be used. The text says which, and what is wrong."""


class Scores(Strict):
    """What one detector gave each token."""

    prompt: tuple[Row, ...] = Field(min_length=1, description="one entry for each token of the prompt")
    reply: tuple[Row, ...] = Field(
        default=(), description="one entry for each generated token but the last, which the model never reads"
    )


class RunOfTokens(Strict):
    """Consecutive tokens of a prompt that one role wrote."""

    role: Role
    tokens: int = Field(ge=1)


class Trace(Strict):
    """A recorded request."""

    format: Format = Field(default=Format.CHAT, description="how its text reached the model: chat or raw")
    segments: tuple[RunOfTokens, ...] = Field(
        default=(), description="who wrote the prompt; left out: nobody knows, and every rule reads everything"
    )
    stream_from: int | None = Field(
        default=None, ge=0, description="from which position streams are read; the end of the prompt if left out"
    )
    scores: dict[DetectorName, Scores] = Field(min_length=1, description="by the detector's name in the policy file")

    @model_validator(mode="after")
    def _same_lengths(self) -> Self:
        lengths = {(len(scores.prompt), len(scores.reply)) for scores in self.scores.values()}
        if len(lengths) > 1:
            raise ValueError(f"'scores' are of different lengths (prompt, reply): {sorted(lengths)}")
        if self.segments and sum(run.tokens for run in self.segments) != self.num_prompt:
            raise ValueError(
                f"'segments' have {sum(run.tokens for run in self.segments)} tokens, the scores of the "
                f"prompt {self.num_prompt}"
            )
        return self

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(next(iter(self.scores.values())).prompt)

    @property
    def num_reply(self) -> int:
        """Tokens of the reply that were read."""
        return len(next(iter(self.scores.values())).reply)


class Expected(Strict):
    """What a policy is expected to do; what is left out may be anything."""

    action: Action = Field(description="the most severe that is enforced")
    rule: str | None = Field(default=None, description="what decides it")
    stage: Stage | None = Field(default=None, description="when it is decided")
    at: int | None = Field(default=None, ge=0, description="newest position when it is decided, from 0")
    rules: tuple[str, ...] | None = Field(default=None, description="all that fire, in shadow too, in any order")


class Case(Strict):
    """One request under one policy."""

    name: str = Field(min_length=1)
    policy: Name | None = Field(default=None, description="of the file; the first if left out")
    trace: str | None = Field(
        default=None, description="a JSON file with format, segments, stream_from and scores, relative to this file"
    )
    format: Format | None = None
    segments: tuple[RunOfTokens, ...] | None = None
    stream_from: int | None = Field(default=None, ge=0)
    scores: dict[DetectorName, Scores] | None = None
    expect: Expected

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        own = [key for key in ("format", "segments", "stream_from", "scores") if getattr(self, key) is not None]
        if self.trace is not None and own:
            raise ValueError(f"'trace' names a file that says {own[0]!r}; leave one of them out")
        if self.trace is None and self.scores is None:
            raise ValueError("a case has 'scores' or a 'trace'")
        return self

    def recorded(self, folder: Path) -> Trace:
        """The request.

        Args:
            folder: that ``trace`` is relative to.
        Raises:
            CaseError: the trace cannot be read, or is none.
        """
        if self.trace is None:
            own = {key: getattr(self, key) for key in ("format", "segments", "stream_from", "scores")}
            return Trace.model_validate({key: value for key, value in own.items() if value is not None})
        path = folder / self.trace
        try:
            return Trace.model_validate_json(path.read_text(encoding="utf-8"), strict=True)
        except OSError as error:
            raise CaseError(f"case {self.name!r}: {path}: cannot be read ({error.strerror}).") from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise CaseError(f"case {self.name!r}: {path}: is no trace: {_said(error)}") from error


class Cases(Strict):
    """A file of cases."""

    cases: tuple[Case, ...] = Field(min_length=1)


def read_cases(path: Path) -> Cases:
    """Read and validate.

    Raises:
        CaseError: the file cannot be read, or is not of this form.
    """
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        found = Cases.model_validate_json(json.dumps(tree, default=str), strict=True)
        for case in found.cases:
            case.recorded(path.parent)
    except OSError as error:
        raise CaseError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise CaseError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except YAMLError as error:
        raise CaseError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise CaseError(f"{path}: {_said(error)}") from error
    return found


def _said(error: ValidationError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({error.reason})"
    lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return "\n".join(lines)
