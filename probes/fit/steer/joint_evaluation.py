"""What steers that are written together do to replies, and what else: the table that single directions get."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.fit.steer.behaviour import Judge
from probes.fit.steer.dose_response import DoseResponse, run_conditions
from probes.fit.steer.evaluation import figures_of, verdict_of
from probes.fit.steer.joint import JointSteer
from probes.fit.steer.report import response_table
from probes.fit.steer.steered_model import SteeredModel
from probes.fit.steer.trial import EvalError, Trial
from probes.fit.steer.verdict import SteerVerdict
from probes.steering.base import Sign

__all__ = ["JointEvaluation", "evaluate_joint", "require_strengths", "write_joint_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JointEvaluation:
    """What was measured.

    Attributes:
        name: of the steers together.
        tap: after which layer they write.
        model: that was steered.
        parts: what is written, in words.
        scaled: what a strength multiplies, in words.
        trial: what was tried.
        judge: of the behaviour.
        response: all conditions.
        verdict: by the rule for directions.
    """

    name: str
    tap: str
    model: str
    parts: tuple[str, ...]
    scaled: str
    trial: Trial
    judge: Judge
    response: DoseResponse
    verdict: SteerVerdict

    def as_dict(self) -> dict[str, Any]:
        """All figures, without replies."""
        return {
            "name": self.name,
            "tap": self.tap,
            "model": self.model,
            "parts": list(self.parts),
            "strength": self.scaled,
            "verdict": self.verdict.grade.value,
            "recommended_strength": self.verdict.recommended,
            "reasons": list(self.verdict.reasons),
            "judge": {"auroc": self.judge.auroc.rounded(), "examples": self.judge.examples},
            "plain": figures_of(self.response.plain),
            "prompt_only": figures_of(self.response.instruction),
            "steered": [figures_of(condition) for condition in self.response.steered],
            "random": [figures_of(condition) for condition in self.response.random],
        }


def require_strengths(strengths: Sequence[float]) -> list[float]:
    """Strengths in order, each once.

    Raises:
        EvalError: there are none, or one is not above 0.
    """
    if not strengths or min(strengths) <= 0:
        raise EvalError("--strengths: numbers above 0 are needed; 1 writes what the steers say, 2 twice as much.")
    return sorted(set(strengths))


def evaluate_joint(
    steers: Sequence[JointSteer],
    parts: Sequence[str],
    trial: Trial,
    *,
    scaled: str,
    sign: Sign,
    judge: Judge,
    model: SteeredModel,
    progress: Callable[[str], None],
) -> JointEvaluation:
    """Measure steers beside the plain model, the prompt alone and random directions that give each row the same dose.

    Args:
        steers: the same ones at each strength, weakest first.
        parts: what is written, in words.
        trial: what is tried; its operators are not read.
        scaled: what a strength multiplies, in words.
        sign: whether they are to make more or less of the behaviour.
        judge: of the behaviour.
        model: that is steered.
        progress: told what is being done.
    """
    response = run_conditions(
        trial, steers, JointSteer.at_random, sign=sign, model=model, judge=judge, progress=progress
    )
    return JointEvaluation(
        name=steers[0].name,
        tap=str(steers[0].tap),
        model=model.model.id,
        parts=tuple(parts),
        scaled=scaled,
        trial=trial,
        judge=judge,
        response=response,
        verdict=verdict_of(response, judge),
    )


def write_joint_report(found: JointEvaluation, folder: Path, *, command: str) -> Path:
    """Write ``NAME.md`` and ``NAME.json``.

    Args:
        found: what is reported.
        folder: made if needed.
        command: that repeats it.
    Returns: the path of the Markdown file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n"
    (folder / f"{found.name}.json").write_text(figures, encoding="utf-8")
    path = folder / f"{found.name}.md"
    path.write_text(_markdown(found, command), encoding="utf-8")
    return path


def _markdown(found: JointEvaluation, command: str) -> str:
    verdict, trial = found.verdict, found.trial
    recommended = "none" if verdict.recommended is None else f"{verdict.recommended:g}"
    parts = [
        f"# Steers written together: {found.name}",
        f"{found.model}, after {found.tap}, positions `{trial.positions.value}`. A strength multiplies {found.scaled}.",
        f"**Verdict: `{verdict.grade.value}`; recommended strength: {recommended}.**",
        "\n".join(f"* {reason}" for reason in verdict.reasons),
        "\n".join(f"* {part}" for part in found.parts),
        response_table(found.response),
        f"{len(trial.prompts)} prompts, greedy replies of at most {trial.max_tokens} tokens; the columns are those of "
        "`telltale steer eval`. Random: the dose that each row gets by all steers together, along one random "
        f"direction; means of {trial.seeds}, and the band of their P(target). Dose: the length of the whole change of "
        "a row, in median norms.",
        f"```bash\n{command}\n```",
    ]
    return "\n\n".join(parts) + "\n"
