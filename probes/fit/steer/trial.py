"""What is tried when a steer is evaluated: prompts, strengths, rows and counts. It runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from probes.errors import TelltaleError
from probes.fit.rows.json_lines import read_json_lines
from probes.steering import operator_kinds, parse_operator
from probes.steering.base import Operator
from probes.steering.steer import Positions

__all__ = ["EvalError", "Trial", "default_strengths", "operators_at", "read_prompts"]

_MIN_STRENGTHS = 5
_MIN_PROMPTS = 8
_ADD_STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5)
_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


class EvalError(TelltaleError, ValueError):
    """A steer cannot be evaluated as asked for."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is tried.

    Attributes:
        prompts: user messages whose replies are judged.
        instruction: system message of the prompt-only baseline.
        operators: one operator at each strength, weakest first, as ``operators_at`` gives them; of a direction alone.
        positions: which rows are written to.
        max_dose: largest change of a row, in median norms.
        max_tokens: of a reply.
        seeds: how many random directions.
        neutral_lines: lines of ordinary text that KL and cross-entropy rest on.
        seed: of random directions and of resampling.
    """

    prompts: tuple[str, ...]
    instruction: str
    operators: tuple[Operator, ...] = ()
    positions: Positions = Positions.GENERATED
    max_dose: float = 0.5
    max_tokens: int = 40
    seeds: int = 3
    neutral_lines: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would measure nothing."""
        for name, low in (("max_tokens", 4), ("seeds", 1), ("neutral_lines", 1)):
            if getattr(self, name) < low:
                raise EvalError(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if not self.prompts or not self.instruction.strip():
            raise EvalError("prompts and the instruction of the prompt-only baseline are needed. Give both.")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read JSON lines: ``{"prompt": "..."}``.

    Raises:
        EvalError: the file cannot be read, a line is not of that form, or there are too few.
    """
    found = read_json_lines(path, TypeAdapter(_Line), form='{"prompt": "..."}', error=EvalError)
    prompts = tuple(item.line.prompt for item in found)
    if len(prompts) < _MIN_PROMPTS:
        raise EvalError(f"{path}: {len(prompts)} prompts; at least {_MIN_PROMPTS} are needed, 24 or more are usual.")
    return prompts


def default_strengths(kind: str) -> tuple[float, ...]:
    """Five strengths that suit an operator: median norms for ``add``, shares for all others."""
    return _ADD_STRENGTHS if kind == "add" else _SHARES


def operators_at(kind: str, strengths: Sequence[float]) -> tuple[Operator, ...]:
    """The operator at each strength, weakest first.

    ``ablate`` and ``cap`` have no dose of their own: their strength is the share, above 0 to 1, of what they take
    away, and the dose follows from what the rows hold.

    Raises:
        EvalError: fewer than five different strengths, one is out of the operator's range, or their signs differ.
        SteerError: the operator is not known.
    """
    chosen = sorted(set(strengths), key=abs)
    if len(chosen) < _MIN_STRENGTHS:
        raise EvalError(
            f"--strengths names {len(chosen)} different ones; a dose-response needs at least {_MIN_STRENGTHS}, for "
            f"example {','.join(f'{strength:g}' for strength in default_strengths(kind))}."
        )
    if kind in operator_kinds() and "strength" not in operator_kinds()[kind].model_fields:
        raise EvalError(f"the operator {kind!r} has no strength: it has no dose-response. Evaluate another one.")
    try:
        made = tuple(parse_operator(kind, {"strength": float(strength)}) for strength in chosen)
    except ValidationError as error:
        first = error.errors()[0]
        raise EvalError(
            f"--strengths: {first['input']!r} is out of range for {kind!r}: {first['msg']}. Choose others."
        ) from error
    if len({operator.sign for operator in made}) > 1:
        raise EvalError("--strengths has both signs: these are two steers with two targets. Evaluate them apart.")
    return made
