"""What edits of latents do to replies, and what else: the table that directions get, for several latents together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.fit.steer.behaviour import Judge
from probes.fit.steer.dose_response import DoseResponse, run_conditions
from probes.fit.steer.evaluation import figures_of, verdict_of
from probes.fit.steer.joint import JointSteer, join
from probes.fit.steer.report import response_table
from probes.fit.steer.steered_model import SteeredModel
from probes.fit.steer.trial import EvalError, Trial
from probes.fit.steer.verdict import SteerVerdict
from probes.sae.edits import Edit, EditKind
from probes.sae.file import SaeFile
from probes.sae.latent_steer import LatentSteer
from probes.steering.artifact import Safety
from probes.steering.base import Operator, Sign
from probes.steering.raise_latent import RaiseLatent
from probes.steering.reduce_latent import ReduceLatent
from probes.steering.steer import make_steer

__all__ = ["EditsEvaluation", "evaluate_edits", "joint_edits", "write_edits_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditsEvaluation:
    """What was measured.

    Attributes:
        name: of the edits together.
        file: of the SAE.
        edits: that were written.
        trial: what was tried.
        judge: of the behaviour.
        response: all conditions; a strength is what the edits' levels were multiplied by.
        verdict: by the rule for directions.
    """

    name: str
    file: SaeFile
    edits: tuple[Edit, ...]
    trial: Trial
    judge: Judge
    response: DoseResponse
    verdict: SteerVerdict

    def as_dict(self) -> dict[str, Any]:
        """All figures, without replies."""
        return {
            "name": self.name,
            "sae": self.file.card.name,
            "sae_digest": self.file.card.tensors_digest,
            "edits": [{"op": edit.kind.value, "latent": edit.latent, "level": edit.level} for edit in self.edits],
            "verdict": self.verdict.grade.value,
            "recommended_strength": self.verdict.recommended,
            "reasons": list(self.verdict.reasons),
            "judge": {"auroc": self.judge.auroc.rounded(), "examples": self.judge.examples},
            "plain": figures_of(self.response.plain),
            "prompt_only": figures_of(self.response.instruction),
            "steered": [figures_of(condition) for condition in self.response.steered],
            "random": [figures_of(condition) for condition in self.response.random],
        }


def joint_edits(name: str, file: SaeFile, edits: Sequence[Edit], trial: Trial, strength: float) -> JointSteer:
    """Edits as they are written together, with their levels multiplied.

    Args:
        name: of them together.
        file: of the SAE.
        edits: at least one.
        trial: rows, and the largest dose of each edit.
        strength: above 0; 1 leaves the levels as they are.
    Raises:
        SteerError: an edit exceeds the trial's ``max_dose``, or cannot be written.
    """
    steers = [
        # Evaluated, not served: what an edit does to safety is for the policy file to allow.
        make_steer(
            f"{name}_{edit.latent}",
            LatentSteer(file, edit.latent, Safety.NEUTRAL),
            _operator(edit, strength),
            positions=trial.positions,
            max_dose=trial.max_dose,
            allow_safety_reducing=True,
        )
        for edit in edits
    ]
    return join(name, steers, strength=strength)


def evaluate_edits(
    name: str,
    file: SaeFile,
    edits: Sequence[Edit],
    trial: Trial,
    strengths: Sequence[float],
    *,
    judge: Judge,
    model: SteeredModel,
    progress: Callable[[str], None],
) -> EditsEvaluation:
    """Measure edits beside the plain model, the prompt alone and random directions that give each row the same dose.

    Args:
        name: of the edits together.
        file: of the SAE.
        edits: at least one.
        trial: what is tried; its operators are not read.
        strengths: what the levels are multiplied by.
        judge: of the behaviour of the positive texts.
        model: the SAE's.
        progress: told what is being done.
    Raises:
        EvalError: no strengths, or one that is not above 0.
        SteerError: see ``joint_edits``.
        probes.artifact.ArtifactError: the SAE belongs to another model.
    """
    file.require_model(model.model)
    if not strengths or min(strengths) <= 0:
        raise EvalError("--strengths: numbers above 0 are needed; 1 writes what the edits say, 2 twice as much.")
    steers = [joint_edits(name, file, edits, trial, strength) for strength in sorted(set(strengths))]
    response = run_conditions(
        trial, steers, JointSteer.at_random, sign=Sign.MORE, model=model, judge=judge, progress=progress
    )
    return EditsEvaluation(
        name=name,
        file=file,
        edits=tuple(edits),
        trial=trial,
        judge=judge,
        response=response,
        verdict=verdict_of(response, judge),
    )


def write_edits_report(found: EditsEvaluation, folder: Path, *, command: str) -> Path:
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


def _markdown(found: EditsEvaluation, command: str) -> str:
    verdict, trial = found.verdict, found.trial
    recommended = "none" if verdict.recommended is None else f"{verdict.recommended:g}"
    edits = "\n".join(f"* `{edit.kind.value}` {edit.latent}, level {edit.level:.4g}" for edit in found.edits)
    parts = [
        f"# Edits of latents: {found.name}",
        f"{found.file.card.name} at {found.file.card.tap}, {found.file.card.model.id}, positions "
        f"`{trial.positions.value}`. A strength is what all levels are multiplied by.",
        f"**Verdict: `{verdict.grade.value}`; recommended strength: {recommended}.**",
        "\n".join(f"* {reason}" for reason in verdict.reasons),
        edits,
        response_table(found.response),
        f"{len(trial.prompts)} prompts, greedy replies of at most {trial.max_tokens} tokens; the columns are those of "
        "`telltale steer eval`. Random: the dose that each row gets by all edits together, along one random direction; "
        f"means of {trial.seeds}, and the band of their P(target). Dose: the length of the whole change of a row, in "
        "median norms.",
        f"```bash\n{command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _operator(edit: Edit, strength: float) -> Operator:
    level = edit.level * strength
    return RaiseLatent(floor=level) if edit.kind is EditKind.RAISE else ReduceLatent(by=level)
