"""Prompts with two possible replies each: what a causal test of a direction looks at. It runs nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from probes.card import Format
from probes.errors import TelltaleError
from probes.fit.rows.json_lines import read_json_lines
from probes.fit.steer.steered_model import SteeredModel
from probes.fit.steer.teacher_forced import Line, TeacherForced
from probes.steering.base import Float64
from probes.steering.steer import Steer

__all__ = ["Case", "CausalError", "Preferences", "cases_digest", "read_cases"]

_MIN_CASES = 4
_FORM = '{"prompt": "...", "target": "...", "other": "...", "label": 0 or 1}'


class CausalError(TelltaleError, ValueError):
    """The causal level of a detector cannot be measured as asked for."""


class Case(BaseModel):
    """A prompt, the beginning of the reply that the concept is said to cause, and that of another one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(min_length=1)
    target: str = Field(min_length=1)
    other: str = Field(min_length=1)
    label: int = Field(ge=0, le=1, description="1: the concept is present in the prompt")


def read_cases(path: Path) -> tuple[Case, ...]:
    """Read JSON lines of ``Case``.

    Raises:
        CausalError: the file cannot be read, a line is not of that form, or a label has too few.
    """
    cases = tuple(item.line for item in read_json_lines(path, TypeAdapter(Case), form=_FORM, error=CausalError))
    for label in (0, 1):
        count = sum(case.label == label for case in cases)
        if count < _MIN_CASES:
            raise CausalError(f"{path}: {count} cases of label {label}; at least {_MIN_CASES} of each are needed.")
    return cases


def cases_digest(cases: Sequence[Case]) -> str:
    """SHA-256 over all cases, in their order."""
    return hashlib.sha256(json.dumps([case.model_dump() for case in cases]).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Preferences:
    """How much the model prefers each case's target, computed again and again under different steers.

    Attributes:
        forced: targets at even places, others at odd ones.
    """

    forced: TeacherForced

    @classmethod
    def of(cls, cases: Sequence[Case], model: SteeredModel, *, layer: int, text_format: Format) -> Preferences:
        """Prepare cases.

        Args:
            cases: at least one.
            model: of all.
            layer: after which steers write.
            text_format: whether prompts are user messages or stand as they are.
        Raises:
            CausalError: a reply has no tokens of its own.
        """
        lines = []
        for case in cases:
            prompt = model.chat(case.prompt) if text_format is Format.CHAT else model.text(case.prompt)
            for reply in (case.target, case.other):
                continuation = model.continuation(reply)
                if not continuation:
                    raise CausalError(f"the reply {reply!r} has no tokens. Give it a text.")
                lines.append(Line((*prompt, *continuation), num_prompt=len(prompt), first=len(prompt)))
        return cls(TeacherForced(model, lines, layer=layer))

    def under(self, steer: Steer | None) -> Float64:
        """Log P(target | prompt) - log P(other | prompt) of each case: (cases,) float64, nats."""
        sums = np.array([float(found.sum()) for found in self.forced.of_tokens(steer)])
        differences: Float64 = sums[0::2] - sums[1::2]
        return differences
