"""Edits of latents at several strengths, measured as steers that are written together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from probes.fit.steer.behaviour import Judge
from probes.fit.steer.joint import JointSteer, join
from probes.fit.steer.joint_evaluation import JointEvaluation, evaluate_joint, require_strengths
from probes.fit.steer.steered_model import SteeredModel
from probes.fit.steer.trial import Trial
from probes.sae.edits import Edit, EditKind
from probes.sae.file import SaeFile
from probes.sae.latent_steer import LatentSteer
from probes.steering.artifact import Safety
from probes.steering.base import Operator, Sign
from probes.steering.raise_latent import RaiseLatent
from probes.steering.reduce_latent import ReduceLatent
from probes.steering.steer import make_steer

__all__ = ["evaluate_edits", "joint_edits"]


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
) -> JointEvaluation:
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
    return evaluate_joint(
        [joint_edits(name, file, edits, trial, strength) for strength in require_strengths(strengths)],
        [f"`{edit.kind.value}` {edit.latent} of {file.card.name}, level {edit.level:.4g}" for edit in edits],
        trial,
        scaled="the levels of all edits",
        sign=Sign.MORE,
        judge=judge,
        model=model,
        progress=progress,
    )


def _operator(edit: Edit, strength: float) -> Operator:
    level = edit.level * strength
    return RaiseLatent(floor=level) if edit.kind is EditKind.RAISE else ReduceLatent(by=level)
