"""The causal level of a linear detector: whether the model uses the direction that the detector reads.

Read is not used: a direction may tell prompts apart and yet move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from probes.artifact import Artifact, write_card
from probes.cachedir import user_cache_dir
from probes.card import Format
from probes.detectors import load_detector
from probes.detectors.linear import Linear
from probes.fit.reading.activations import ActivationReader
from probes.fit.rows.ordinary import corpus_digest, read_ordinary
from probes.fit.steer.causal_cases import Case, CausalError, Preferences, cases_digest
from probes.fit.steer.dose_response import random_steer
from probes.fit.steer.side_effects import NeutralText
from probes.fit.steer.steered_model import SteeredModel
from probes.steering.ablate import Ablate
from probes.steering.add import Add
from probes.steering.base import Operator, Vector
from probes.steering.steer import Positions, Steer
from probes.taps import Site, Tap

__all__ = ["CARD_KEY", "MAX_P", "CausalFindings", "CausalTest", "Level", "level_of", "measure_causal", "predictive"]

CARD_KEY = "causal"
"""Under ``evaluation`` of the detector's card."""
MAX_P = 0.01
MAX_KL = 0.1
"""Nats per token on ordinary text, for level 4."""
_PERCENTILE = 95
_CHANCE = 0.5
_SETS = ("pairs_length_matched", "pairs")
"""Sets of a card's evaluation that are looked at, the stricter first."""
_BASELINES = ("tf_idf", "length_only", "question_mark_only")


class Level(IntEnum):
    """What has been shown of a direction; each level asks for all below it."""

    PREDICTIVE = 0
    BEYOND_TEXT = 1
    NECESSARY = 2
    SUFFICIENT = 3
    SPECIFIC = 4


@dataclass(frozen=True, slots=True)
class CausalTest:
    """An effect of the direction beside those of random directions that give each row the same dose.

    Attributes:
        effect: in the direction of the hypothesis: nats, or nats per token for a KL.
        null: of each random direction.
    """

    effect: float
    null: tuple[float, ...]

    @property
    def p(self) -> float:
        """(1 + random directions that do at least as much) / (1 + random directions)."""
        return (1 + sum(value >= self.effect for value in self.null)) / (1 + len(self.null))

    def as_dict(self) -> dict[str, Any]:
        """For a card."""
        low, median, high = np.percentile(self.null, (100 - _PERCENTILE, 50, _PERCENTILE))
        return {
            "effect": round(self.effect, 5),
            "p": round(self.p, 5),
            "null_5_50_95": [round(float(value), 5) for value in (low, median, high)],
            "null": [round(value, 5) for value in self.null],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalFindings:
    """All that was measured.

    Attributes:
        predictive, beyond_text: what the card's evaluation says.
        base: mean preference for the target, and share of the cases that prefer it, by label: what there is to move.
        necessary: fall of the preference on label-1 prompts when the direction is ablated.
        sufficient: its rise on label-0 prompts when the direction is added.
        kl: KL on ordinary text when it is added.
        ablation_kl: and when it is ablated; told, not judged.
        settings: what decides all of this.
    """

    predictive: bool
    beyond_text: bool
    base: Mapping[str, Mapping[str, float]]
    necessary: CausalTest
    sufficient: CausalTest
    kl: CausalTest
    ablation_kl: float
    settings: Mapping[str, Any]

    @property
    def specific(self) -> bool:
        """Whether ordinary text hardly changes, and no more than by random directions."""
        return self.kl.effect <= MAX_KL and self.kl.effect <= float(np.percentile(self.kl.null, _PERCENTILE))

    @property
    def holds(self) -> Mapping[Level, bool]:
        """Each level by itself."""
        necessary, sufficient = self.necessary.p <= MAX_P, self.sufficient.p <= MAX_P
        return {
            Level.PREDICTIVE: self.predictive,
            Level.BEYOND_TEXT: self.beyond_text,
            Level.NECESSARY: necessary,
            Level.SUFFICIENT: sufficient,
            Level.SPECIFIC: necessary and sufficient and self.specific,
        }

    @property
    def level(self) -> Level | None:
        """The highest level that holds together with all below it."""
        return level_of(self.holds)

    def as_dict(self) -> dict[str, Any]:
        """For the card."""
        level = self.level
        return {
            "level": None if level is None else f"L{level.value}",
            "holds": {f"L{each.value}_{each.name.lower()}": held for each, held in self.holds.items()},
            "base": {label: dict(found) for label, found in self.base.items()},
            "necessary": self.necessary.as_dict(),
            "sufficient": self.sufficient.as_dict(),
            "kl_of_addition": self.kl.as_dict(),
            "kl_of_ablation": round(self.ablation_kl, 5),
            **self.settings,
        }

    def write_card(self, artifact: Artifact) -> None:
        """Put this onto the detector's card; tensors, calibrations and canary stay as they are."""
        evaluation = {**artifact.card.evaluation, CARD_KEY: self.as_dict()}
        write_card(artifact.path, artifact.card.model_copy(update={"evaluation": evaluation}))


def level_of(holds: Mapping[Level, bool]) -> Level | None:
    """The highest level below which nothing is missing; None if even the first does not hold."""
    found = None
    for level in Level:
        if not holds[level]:
            break
        found = level
    return found


def predictive(evaluation: Mapping[str, Any], text_format: Format) -> tuple[bool, bool]:
    """What a card's evaluation says: surely above chance, and surely above every text baseline.

    The length-matched pairs count where there are such, else all pairs; without either nothing has been shown.

    Args:
        evaluation: of the card.
        text_format: whose figures are looked at.
    """
    sets = evaluation.get(text_format.value, {})
    found = next((sets[name] for name in _SETS if name in sets), None)
    if found is None:
        return False, False
    low = found["probe"]["auroc"][1]
    baselines = [found[name]["auroc"][0] for name in _BASELINES if name in found]
    return low > _CHANCE, bool(baselines) and all(low > value for value in baselines)


def measure_causal(
    artifact: Artifact,
    cases: Sequence[Case],
    *,
    model_dir: Path,
    model: SteeredModel,
    strength: float,
    directions: int,
    neutral_lines: int,
    seed: int,
    created_by: str,
    progress: Callable[[str], None],
) -> CausalFindings:
    """Ablate and add a detector's direction, and random ones, at all positions behind the sinks.

    Args:
        artifact: of a linear detector.
        cases: of both labels.
        model_dir: folder of its model.
        model: the same, loaded.
        strength: of the addition, in median norms.
        directions: how many random ones; 99 are the fewest with which p can be 0.01.
        neutral_lines: lines of ordinary text for the KL.
        seed: of the random directions.
        created_by: version, for the card.
        progress: told what is being done.
    Raises:
        CausalError: the detector is not linear or does not read the residual stream, or there are too few directions.
        probes.artifact.ArtifactError: the model is another one.
    """
    artifact.require_model(model.model)
    tap, weight = _direction_of(artifact)
    if directions < round(1 / MAX_P) - 1:
        raise CausalError(
            f"{directions} random directions: with fewer than {round(1 / MAX_P) - 1} no p reaches {MAX_P}."
        )
    reader = ActivationReader(
        model_dir, model=model.model, layers=[tap.layer], cache_dir=user_cache_dir(), progress=progress
    )
    progress("ordinary text")
    ordinary = read_ordinary(reader, tap.layer)
    direction = weight / np.linalg.norm(weight)
    vector = Vector(
        direction, median_norm=ordinary.median_norm, mean=ordinary.mean(direction), ceiling=ordinary.ceiling(direction)
    )
    skip_first = max(artifact.card.skip_first, ordinary.skip_first)
    ablate = _everywhere(Ablate(), vector, tap, skip_first)
    add = _everywhere(Add(strength=strength), vector, tap, skip_first)
    text_format = Format.CHAT if Format.CHAT in artifact.card.formats else Format.RAW
    parts = [
        Preferences.of([case for case in cases if case.label == label], model, layer=tap.layer, text_format=text_format)
        for label in (0, 1)
    ]
    neutral = NeutralText(model, layer=tap.layer, lines=neutral_lines)
    base = [part.under(None) for part in parts]
    progress("the detector's direction")

    def fall(steer: Steer) -> float:
        return float((base[1] - parts[1].under(steer)).mean())

    def rise(steer: Steer) -> float:
        return float((parts[0].under(steer) - base[0]).mean())

    own = (fall(ablate), rise(add), neutral.cost(add).kl)
    ablation_kl = neutral.cost(ablate).kl
    drawn = []
    for number in range(directions):
        progress(f"random direction {number + 1} of {directions}")
        generator = np.random.default_rng((seed, number))
        away, added = (random_steer(steer, generator) for steer in (ablate, add))
        drawn.append((fall(away), rise(added), neutral.cost(added).kl))
    shown = predictive(artifact.card.evaluation, text_format)
    tests = [CausalTest(effect, tuple(null)) for effect, null in zip(own, zip(*drawn, strict=True), strict=True)]
    return CausalFindings(
        predictive=shown[0],
        beyond_text=shown[1],
        base={
            f"label_{label}": {
                "cases": len(found),
                "preference": round(float(found.mean()), 5),
                "prefer_target": round(float((found > 0).mean()), 5),
            }
            for label, found in enumerate(base)
        },
        necessary=tests[0],
        sufficient=tests[1],
        kl=tests[2],
        ablation_kl=ablation_kl,
        settings={
            "strength": strength,
            "random_directions": directions,
            "seed": seed,
            "format": text_format.value,
            "median_norm": round(ordinary.median_norm, 5),
            "benign_mean": round(vector.mean, 5),
            "neutral_lines": neutral_lines,
            "corpus_digest": corpus_digest(),
            "cases_digest": cases_digest(cases),
            "created_by": created_by,
        },
    )


def _direction_of(artifact: Artifact) -> tuple[Tap, np.ndarray]:
    detector = load_detector(artifact)
    if not isinstance(detector, Linear) or detector.tap.site is not Site.RESID_POST:
        raise CausalError(
            f"{artifact.path}: a {artifact.card.kind} detector at {', '.join(artifact.card.taps)}; a causal level is "
            "measured of linear detectors of the residual stream (resid_post) only."
        )
    return detector.tap, detector.weight


def _everywhere(operator: Operator, vector: Vector, tap: Tap, skip_first: int) -> Steer:
    # Without a limit: a clipped ablation would leave some of the direction in.
    update = replace(operator.update(vector, max_dose=1.0), limit=float("inf"))
    return Steer(operator.kind, tap, update, Positions.ALL, skip_first, vector.median_norm)
