"""Carries a detector over to a new build of its model with texts that nobody has labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from probes.artifact import Artifact
from probes.card import Format, ModelRef, Stage
from probes.detectors import Detector, load_detector
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import RequestScores, score_requests, statistics_of_requests
from probes.fit.realign.fold import fold, require_foldable
from probes.fit.realign.moments import Float64, Moments
from probes.fit.realign.ridge import RealignError, activations_r2, fit_map
from probes.fit.rows.example import Example
from probes.fit.staleness.rows import BuildReader
from probes.taps import Tap

__all__ = ["FLOOR", "PairedReader", "Repaired", "repair"]

FLOOR = 0.8
"""R^2 of the score below which nothing is written.

A score that keeps the share R^2 of its variance keeps about its square root of the distance between the classes: at 0.8
an AUROC of 0.95 becomes 0.93, which is the margin of the check.
"""
_PARTS = ("fit", "fit", "fit", "choose", "report")
"""Fifths of the texts, dealt by their digest."""
_CHUNK = 64
"""Requests whose activations on both builds are held at a time."""
_NORM_TEST_ROWS = 32
_FEWEST = 10
_ROUND = 4


class PairedReader(BuildReader, Protocol):
    """A build that can be compared with another one."""

    @property
    def model(self) -> ModelRef:
        """Which build it is."""
        ...

    def sink_positions(self, examples: Sequence[Example], text_format: Format) -> int:
        """How many leading positions have a norm far above the rest."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """A detector on the new build.

    Attributes:
        artifact: in memory, not calibrated.
        record: what stands on its card: from which artifact, on which data, how well.
    """

    artifact: Artifact
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of the texts; ``shared`` counts the leading tokens of each request that all of its format begin with."""

    requests: list[Rendered]
    shared: list[int]
    moments: dict[Tap, Moments]


def repair(
    artifact: Artifact,
    examples: Sequence[Example],
    *,
    old: PairedReader,
    new: PairedReader,
    data_digest: str,
    floor: float = FLOOR,
    created_by: str,
    progress: Callable[[str], None],
) -> Repaired:
    """Map the new build's activations to the old one's, and fold the map into the detector (arXiv:2606.15980).

    Both builds are given the same tokens, as the new one's template and tokenizer make them, in every format of the
    card. The penalty of the ridge is chosen on a fifth of the texts, the quality is told on another one.

    Args:
        artifact: of the old build.
        examples: texts, responses included; labels are not looked at.
        old: reader of the build on the card.
        new: reader of the new build.
        data_digest: of the texts.
        floor: least R^2 of the held-out score.
        created_by: version that repairs.
        progress: told what is being done.
    Raises:
        RealignError: the kind or the builds cannot be mapped, the texts are too few, or the score is told too badly.
        probes.artifact.ArtifactError: the old reader is of another model than the card's.
    """
    artifact.require_model(old.model)
    require_foldable(artifact)
    _require_comparable(old.model, new.model)
    card = artifact.card
    skip_first = max(new.sink_positions(examples[:_NORM_TEST_ROWS], text_format) for text_format in card.formats)
    parts = _read(artifact, examples, old, new, skip=max(skip_first, card.skip_first))
    detector = load_detector(artifact)
    maps = {
        part.tap: fit_map(parts["fit"].moments[part.tap], parts["choose"].moments[part.tap], part.weight)
        for part in detector.directions()
    }
    fresh = card.model_copy(
        update={
            "model": new.model,
            "skip_first": skip_first,
            "calibrations": (),
            "canary": None,
            "evaluation": {},
            "created_by": created_by,
        }
    )
    made = fold(artifact, maps, fresh)
    told = _told(artifact, made, parts["report"], old, new)
    record = {
        "from": {"tensors_digest": card.tensors_digest, "model": card.model.model_dump(mode="json")},
        "data_digest": data_digest,
        "texts": len(examples),
        "tokens": {name: next(iter(part.moments.values())).count for name, part in parts.items()},
        "penalties": {str(tap): found.penalty for tap, found in maps.items()},
        "r2_activations": {
            str(tap): round(activations_r2(found, parts["report"].moments[tap]), _ROUND) for tap, found in maps.items()
        },
        **told,
    }
    progress(
        f"held-out R^2: score {told['r2_score']:.4f}"
        + "".join(f", {name} {value:.4f}" for name, value in told["r2_statistics"].items())
    )
    lowest = min([told["r2_score"], *told["r2_statistics"].values()])
    if lowest < floor:
        raise RealignError(
            f"{artifact.path}: on held-out texts the repaired detector tells the old one's score with an R^2 of "
            f"{lowest:.3f}; {floor:g} is the least. Give more texts ({len(examples)} were given), or train the "
            "detector on the new build."
        )
    card = made.card.model_copy(update={"training": {**card.training, "realigned": record}})
    return Repaired(artifact=Artifact(made.path, card, made.tensors), record=record)


def _require_comparable(old: ModelRef, new: ModelRef) -> None:
    if new.tokenizer_digest != old.tokenizer_digest:
        raise RealignError(
            f"{new.id!r} has another tokenizer than {old.id!r}: its tokens are not those of the old build, so their "
            "activations cannot be paired. Train the detector on it."
        )
    if (new.d_model, new.num_layers) != (old.d_model, old.num_layers):
        raise RealignError(
            f"{new.id!r} has {new.num_layers} layers {new.d_model} wide, {old.id!r} {old.num_layers} of {old.d_model}: "
            "another architecture, not another build. Train the detector on it."
        )
    if new.weight_digest == old.weight_digest:
        raise RealignError(
            f"{new.id!r} has the very weights of {old.id!r}: there is nothing to repair. What changed is not in them; "
            "calibrate again (telltale calibrate)."
        )


def _read(
    artifact: Artifact, examples: Sequence[Example], old: PairedReader, new: PairedReader, *, skip: int
) -> dict[str, _Part]:
    """The texts through both builds: the moments of each part."""
    width = artifact.card.model.d_model
    taps = [directions.tap for directions in load_detector(artifact).directions()]
    parts = {name: _Part([], [], {tap: Moments(width) for tap in taps}) for name in dict.fromkeys(_PARTS)}
    for text_format in artifact.card.formats:
        rows = [_tokens(new, example, text_format) for example in examples]
        shared = _shared_prefix(rows)
        for example, row in zip(examples, rows, strict=True):
            part = parts[_part_of(example)]
            part.requests.append(Rendered(row, 0))
            part.shared.append(shared)
    for name, part in parts.items():
        if len(part.requests) < _FEWEST:
            raise RealignError(
                f"{len(part.requests)} of the texts fell to the part {name!r}; at least {_FEWEST} are needed. Give "
                "some hundred texts."
            )
        for requests in _chunks(part.requests):
            label = f"texts to {name}"
            before = dict(old.sweep(requests, taps, label=f"{label}, old build"))
            after = dict(new.sweep(requests, taps, label=f"{label}, new build"))
            for tap in taps:
                columns = [
                    np.concatenate([found[number][tap][skip:] for number in range(len(requests))])
                    for found in (after, before)
                ]
                part.moments[tap].add(*columns)
    return parts


def _told(artifact: Artifact, made: Artifact, part: _Part, old: PairedReader, new: PairedReader) -> dict[str, Any]:
    """R^2 of token scores, and of the statistics that the old card is calibrated for, on held-out requests.

    Tokens that all requests begin with, such as a template's, are easily told and would flatter the first.
    """
    before, after = (
        _scores(load_detector(one), part.requests, reader, one.card.skip_first, label=label)
        for one, reader, label in (
            (artifact, old, "held-out texts, old build"),
            (made, new, "held-out texts, new build"),
        )
    )
    begins = [
        # The builds may have other sinks: only what both score is compared.
        max(shared, was.first, is_now.first)
        for shared, was, is_now in zip(part.shared, before, after, strict=True)
    ]
    was, is_now = (
        np.concatenate([one.scores[begin - one.first :] for one, begin in zip(found, begins, strict=True)])
        for found in (before, after)
    )
    # A constant may be lost where the kind's statistic does not see it; the statistics below do see the others.
    residual, spread = np.atleast_1d((was - is_now).var(axis=0)), np.atleast_1d(was.var(axis=0))
    statistics = {}
    for stage, aggregate in dict.fromkeys((item.stage, item.aggregate) for item in artifact.card.calibrations):
        columns = [statistics_of_requests(aggregate, stage, found) for found in (before, after)]
        if (value := _r2(*columns)) is not None:
            statistics[f"{aggregate} at {stage.value}"] = value
    seen = spread > 0
    return {
        "r2_score": round(float(1.0 - np.max(residual[seen] / spread[seen])), _ROUND) if seen.any() else 0.0,
        "r2_statistics": statistics,
    }


def _scores(
    detector: Detector, requests: Sequence[Rendered], reader: PairedReader, skip_first: int, *, label: str
) -> list[RequestScores]:
    (found,) = score_requests([detector], requests, reader, skip_first=[skip_first], label=label)
    return found


def _tokens(reader: PairedReader, example: Example, text_format: Format) -> tuple[int, ...]:
    stage = Stage.RESPONSE if example.response else Stage.PROMPT
    (request,) = reader.render([example], text_format=text_format, stage=stage)
    return request.tokens


def _shared_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    low, high = min(rows), max(rows)
    return next((place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(map(len, rows)))


def _r2(before: Float64, after: Float64) -> float | None:
    """None where the statistics of the old build do not vary."""
    defined = np.isfinite(before) & np.isfinite(after)
    before, after = before[defined], after[defined]
    spread = float(before.var()) if before.size else 0.0
    return round(1.0 - float(np.mean((before - after) ** 2)) / spread, _ROUND) if spread > 0 else None


def _part_of(example: Example) -> str:
    return _PARTS[int(hashlib.sha256(f"realign/{example.digest}".encode()).hexdigest(), 16) % len(_PARTS)]


def _chunks(requests: Sequence[Rendered]) -> Iterator[Sequence[Rendered]]:
    for start in range(0, len(requests), _CHUNK):
        yield requests[start : start + _CHUNK]
