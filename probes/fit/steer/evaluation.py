"""The evaluation of a steering direction, from trial to verdict, and what of it stands on the direction's card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from probes.artifact import write_card
from probes.fit.evaluation.measure import Estimate
from probes.fit.rows.ordinary import corpus_digest
from probes.fit.steer.behaviour import Judge
from probes.fit.steer.dose_response import Condition, DoseResponse, Figures, run_trial
from probes.fit.steer.side_effects import harmless_prompts
from probes.fit.steer.steered_model import SteeredModel
from probes.fit.steer.trial import Trial
from probes.fit.steer.verdict import Reference, SteerVerdict, Strength, decide
from probes.steering.artifact import SteerArtifact

__all__ = ["CARD_KEY", "SteerEvaluation", "evaluate_steer", "figures_of", "verdict_of"]

CARD_KEY = "dose_response"
"""Under ``evaluation`` of the direction's card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteerEvaluation:
    """Everything that a report says.

    Attributes:
        artifact: the direction.
        trial: what was tried.
        judge: of the behaviour.
        response: what was measured.
        verdict: by rule.
        created_by: version that evaluated.
    """

    artifact: SteerArtifact
    trial: Trial
    judge: Judge
    response: DoseResponse
    verdict: SteerVerdict
    created_by: str

    @property
    def same_texts(self) -> bool:
        """Whether the judge learnt from the very pairs that gave the direction."""
        return self.artifact.card.training.get("pairs_digest") == self.judge.pairs_digest

    def as_dict(self) -> dict[str, Any]:
        """All figures, without replies: for the JSON file and the card."""
        trial = self.trial
        return {
            "verdict": self.verdict.grade.value,
            "recommended_strength": self.verdict.recommended,
            "reasons": list(self.verdict.reasons),
            "operator": trial.operators[0].kind,
            "positions": trial.positions.value,
            "max_dose": trial.max_dose,
            "max_tokens": trial.max_tokens,
            "instruction": trial.instruction,
            "prompts": len(trial.prompts),
            "prompts_digest": _digest(trial.prompts),
            "harmless_prompts_digest": _digest(harmless_prompts()),
            "neutral_lines": trial.neutral_lines,
            "neutral_digest": corpus_digest(),
            "random_directions": trial.seeds,
            "seed": trial.seed,
            "judge": {
                "auroc": self.judge.auroc.rounded(),
                "examples": self.judge.examples,
                "digest": self.judge.digest,
                "same_texts_as_direction": self.same_texts,
            },
            "plain": figures_of(self.response.plain),
            "prompt_only": figures_of(self.response.instruction),
            "steered": [figures_of(condition) for condition in self.response.steered],
            "random": [figures_of(condition) for condition in self.response.random],
            "created_by": self.created_by,
        }

    def write_card(self) -> None:
        """Put the figures onto the direction's card; the tensors stay as they are."""
        card = self.artifact.card
        evaluation = {**card.evaluation, CARD_KEY: self.as_dict()}
        write_card(self.artifact.path, card.model_copy(update={"evaluation": evaluation}))


def evaluate_steer(
    artifact: SteerArtifact,
    trial: Trial,
    judge: Judge,
    *,
    model: SteeredModel,
    created_by: str,
    progress: Callable[[str], None],
) -> SteerEvaluation:
    """Run the trial and judge it.

    Args:
        artifact: the direction; nothing is written to its card yet.
        trial: what is tried.
        judge: of the behaviour that more of the direction makes.
        model: the artifact's.
        created_by: version, for the card.
        progress: told what is being done.
    Raises:
        probes.artifact.ArtifactError: the direction belongs to another model.
        SteerError: a strength exceeds the trial's ``max_dose``, or the direction cannot be used.
    """
    artifact.require_model(model.model)
    response = run_trial(trial, artifact, model=model, judge=judge, progress=progress)
    return SteerEvaluation(
        artifact=artifact,
        trial=trial,
        judge=judge,
        response=response,
        verdict=verdict_of(response, judge),
        created_by=created_by,
    )


def verdict_of(response: DoseResponse, judge: Judge) -> SteerVerdict:
    """The verdict by rule on what was measured."""
    plain, instruction = response.plain.figures, response.instruction.figures
    reference = Reference(
        judge_auroc=judge.auroc.value,
        distinct_2=plain.distinct_2,
        over_refusal=plain.over_refusal,
        prompt_gain=instruction.gain.value,
    )
    strengths = []
    for steered, random in zip(response.steered, response.random, strict=True):
        found, spread = steered.figures, random.spread
        if steered.strength is None or spread is None or found.kl is None:
            raise ValueError("a steered condition has a strength, a KL and a random peer")  # our own mistake
        strengths.append(
            Strength(
                strength=steered.strength,
                target=found.target.value,
                gain=found.gain,
                random_top=spread.top,
                kl=found.kl,
                distinct_2=found.distinct_2,
                anti_steered=found.anti_steered,
                over_refusal=found.over_refusal,
            )
        )
    return decide(strengths, reference)


def figures_of(condition: Condition) -> dict[str, Any]:
    """A condition as JSON, without replies."""
    found = condition.figures
    made: dict[str, Any] = {} if condition.strength is None else {"strength": condition.strength}
    made |= {field.name: _rounded(getattr(found, field.name)) for field in fields(Figures)}
    if condition.spread is not None:
        spread = condition.spread
        made["target_of_each"] = [_rounded(value) for value in spread.targets]
        made["target_band"] = [_rounded(spread.low), _rounded(spread.top)]
    return made


def _rounded(value: float | Estimate | None) -> Any:
    if isinstance(value, Estimate):
        return value.rounded()
    return None if value is None else round(value, 4)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
