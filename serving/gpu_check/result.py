"""What the checks found, and the report of it as JSON and as Markdown. Measures nothing, imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from serving.bench.machine import Machine

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
_EXPECTED: tuple[type[Exception], ...] = (RuntimeError, ValueError, AssertionError)
"""What torch and our own packages raise."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: dotted, e.g. ``op.exact.bfloat16``.
        outcome: ``passed``, ``failed`` or ``skipped``.
        detail: what was found, with its figures, in one sentence.
    """

    name: str
    outcome: str
    detail: str


class Checks:
    """Collects checks; says each as it is made, because a later one may end the process.

    Args:
        progress: told of each.
    """

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._made: list[Check] = []

    @property
    def made(self) -> tuple[Check, ...]:
        """In order."""
        return tuple(self._made)

    def require(self, name: str, passed: bool, detail: str) -> None:
        """A check that was made."""
        self._add(Check(name, PASSED if passed else FAILED, detail))

    def skip(self, name: str, why: str) -> None:
        """A check that could not be made here."""
        self._add(Check(name, SKIPPED, why))

    def guard(self, name: str, work: Callable[[], None], *errors: type[Exception]) -> None:
        """Do what makes checks; an error in it is a failed check of this name, and the other checks go on.

        Args:
            name: of the check that fails then.
            work: adds its own checks.
            errors: besides torch's and ours.
        """
        try:
            work()
        except _EXPECTED + errors as error:
            text = str(error).strip() or "no message"
            self.require(name, False, f"{type(error).__name__}: {text[-1500:]}")

    def _add(self, check: Check) -> None:
        self._made.append(check)
        self._progress(f"{check.outcome:8} {check.name}: {check.detail}")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a tap costs beside the layer it sits on.

    Attributes:
        shape: of the layer, e.g. ``8B``.
        rows: of the step.
        directions: at the tap.
        layer_us: the layer's products alone, without attention, in microseconds.
        tapped_us: the same with the tap behind them.
        tap_us: the tap alone, its weights still in the cache.
    """

    shape: str
    rows: int
    directions: int
    layer_us: float
    tapped_us: float
    tap_us: float

    @property
    def share(self) -> float:
        """What the tap adds to its layer."""
        return self.tapped_us / self.layer_us - 1.0


@dataclass(frozen=True, slots=True)
class GpuReport:
    """Everything that is written down.

    Attributes:
        started: with its time zone.
        device: as torch names it.
        command: as typed.
        machine: processor and versions.
        checks: in order.
        costs: empty where nothing was timed.
        figures: of the engine, as plain data.
    """

    started: datetime
    device: str
    command: str
    machine: Machine
    checks: tuple[Check, ...]
    costs: tuple[Cost, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome == FAILED)

    def write(self, folder: Path, *, name: str = "gpu-check") -> tuple[Path, Path]:
        """Write ``<name>.json`` and ``<name>.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
        as_json.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        as_markdown.write_text(self.markdown(), encoding="utf-8")
        return as_json, as_markdown

    def content(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "format_version": 1,
            "date": self.started.isoformat(timespec="seconds"),
            "command": self.command,
            "device": self.device,
            "machine": asdict(self.machine),
            "passed": not self.failed,
            "checks": [asdict(check) for check in self.checks],
            "costs": [{**asdict(cost), "share": round(cost.share, 5)} for cost in self.costs],
            "figures": dict(self.figures),
        }

    def markdown(self) -> str:
        """The report for people."""
        versions = ", ".join(f"{name} {version}" for name, version in self.machine.versions.items())
        verdict = f"{len(self.failed)} of {len(self.checks)} checks failed" if self.failed else "no check failed"
        parts = [
            f"# GPU check: {verdict}",
            f"{self.started:%Y-%m-%d}, `{self.command}`, on {self.device}. {versions}.",
            _table(("check", "outcome", "found"), ((c.name, c.outcome, _cell(c.detail)) for c in self.checks)),
        ]
        if self.costs:
            parts += [
                "## What a tap costs",
                "The layer is its four products, norms and activation in bfloat16, without attention, so the share is "
                "an upper bound for the layer that carries a tap; the other layers pay nothing. Microseconds.",
                _table(
                    ("layer", "rows", "directions", "layer", "with tap", "tap adds", "tap alone"),
                    (
                        (c.shape, c.rows, c.directions, f"{c.layer_us:.1f}", f"{c.tapped_us:.1f}", f"{c.share:+.1%}",
                         f"{c.tap_us:.1f}")
                        for c in self.costs
                    ),
                ),
            ]  # fmt: skip
        if self.figures:
            rows = ((name, _cell(json.dumps(value))) for name, value in self.figures.items())
            parts += ["## Engine", _table(("figure", "value"), rows)]
        return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
