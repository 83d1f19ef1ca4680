"""The reference: what a detector said of some requests on the build that it was calibrated on. JSON, without texts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from probes.aggregate import Aggregator, AnyAggregator
from probes.artifact import Artifact
from probes.card import Calibration, Digest, Format, ModelRef, Stage
from probes.fit.staleness.comparison import UNLABELLED, Comparison, Pairs, compare
from probes.fit.staleness.decision import Claim
from probes.fit.staleness.rows import Readings, Rows, StalenessError

__all__ = ["Reference", "artifact_digest", "as_option", "calibration_of"]


class Reference(BaseModel):
    """What is recorded; columns have one entry for each request, in the order of the data file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    detector: str = Field(description="name on the card")
    artifact_digest: Digest = Field(description="of everything that a score depends on")
    model: ModelRef
    libraries: dict[str, str] = Field(description="versions")
    read_by: str = Field(description="what computed the activations")
    data_digest: Digest
    stage: Stage
    format: Format
    aggregate: AnyAggregator
    claim: Claim
    certified: bool = Field(description="whether the calibration certifies the promise")
    statistics: tuple[float | None, ...] = Field(min_length=1, description="None: not defined, never fires")
    labels: tuple[Literal[0, 1] | None, ...]
    groups: tuple[int, ...]
    fired: tuple[bool, ...]
    tokens: tuple[str, ...] = Field(description="short digests of the tokens that reached the model")
    quality: Comparison = Field(description="of the build with itself")
    created_by: str

    @model_validator(mode="after")
    def _columns_of_one_length(self) -> Self:
        lengths = {len(column) for column in (self.statistics, self.labels, self.groups, self.fired, self.tokens)}
        if len(lengths) != 1:
            raise ValueError(f"columns have the lengths {sorted(lengths)}: they must be of one length")
        return self

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        calibration: Calibration,
        rows: Rows,
        readings: Readings,
        *,
        libraries: dict[str, str],
        read_by: str,
        seed: int,
        created_by: str,
    ) -> Reference:
        """What is recorded of a detector on the build that its card names."""
        claim = Claim.of(calibration)
        same = Pairs(
            before=readings.statistics,
            after=readings.statistics,
            labels=rows.labels,
            groups=rows.groups,
            fired_before=readings.fired,
            fired_after=readings.fired,
        )
        return cls(
            detector=artifact.card.name,
            artifact_digest=artifact_digest(artifact),
            model=artifact.card.model,
            libraries=libraries,
            read_by=read_by,
            data_digest=rows.digest(),
            stage=calibration.stage,
            format=calibration.format,
            aggregate=calibration.aggregate,
            claim=claim,
            certified=all(part.certified for part in calibration.buckets or (calibration,)),
            statistics=tuple(float(value) if np.isfinite(value) else None for value in readings.statistics),
            labels=tuple(None if label == UNLABELLED else label for label in rows.labels.tolist()),
            groups=tuple(rows.groups.tolist()),
            fired=tuple(readings.fired.tolist()),
            tokens=readings.tokens,
            quality=compare(same, confidence=claim.confidence, seed=seed),
            created_by=created_by,
        )

    def pairs(self, after: Readings) -> Pairs:
        """What was recorded beside other readings of the same requests."""
        return Pairs(
            before=np.array([-np.inf if value is None else value for value in self.statistics], dtype=np.float64),
            after=after.statistics,
            labels=np.array([UNLABELLED if label is None else label for label in self.labels], dtype=np.int64),
            groups=np.array(self.groups, dtype=np.int64),
            fired_before=np.array(self.fired, dtype=np.bool_),
            fired_after=after.fired,
        )

    def digest(self) -> str:
        """SHA-256 over all that is recorded."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what ``write`` wrote.

        Raises:
            StalenessError: it cannot be read, or is no reference of this version.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise StalenessError(
                f"{path}: cannot be read ({error}). Name what `telltale gate record` wrote."
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise StalenessError(
                f"{path}: {where}: {first['msg']} ({error.error_count()} problem(s)). It is no reference of this "
                "version: record it again (telltale gate record)."
            ) from error

    def require(self, artifact: Artifact, rows: Rows) -> Calibration:
        """The calibration that was recorded, if artifact and rows are those of the recording.

        Raises:
            StalenessError: the artifact, its threshold or the rows are others.
        """
        again = "Record it again on the model of the card (telltale gate record)."
        if artifact_digest(artifact) != self.artifact_digest:
            raise StalenessError(
                f"{artifact.path}: the reference is of another artifact ({self.detector!r}, "
                f"{self.artifact_digest[:12]}...). {again}"
            )
        calibration = calibration_of(artifact, self.stage, self.format, as_option(self.aggregate))
        now = Claim.of(calibration)
        if now != self.claim:
            raise StalenessError(
                f"{artifact.path}: calibrated anew since the reference was recorded (thresholds "
                f"{now.thresholds}, recorded {self.claim.thresholds}). {again}"
            )
        if rows.digest() != self.data_digest:
            raise StalenessError(
                f"the data are not those of the reference ({len(rows.examples)} rows, recorded "
                f"{len(self.statistics)}; texts, labels, groups and their order count). Pass the recorded file."
            )
        return calibration


def artifact_digest(artifact: Artifact) -> str:
    """SHA-256 over what a score depends on; a canary or a calibration that is added changes nothing."""
    card = artifact.card
    parts = [card.kind, list(card.taps), card.skip_first, card.tensors_digest]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def as_option(aggregate: Aggregator) -> str:
    """An aggregate as the command line takes it: ``ema,alpha=0.16``."""
    parameters = (f"{name}={json.dumps(value)}" for name, value in aggregate.config().items() if name != "kind")
    return ",".join([aggregate.kind, *parameters])


def calibration_of(artifact: Artifact, stage: Stage, text_format: Format, aggregate: str | None) -> Calibration:
    """The calibration for a stage and a format.

    Args:
        artifact: of the detector.
        stage: when it is judged.
        text_format: how texts reach the model.
        aggregate: as on the command line, e.g. ``ema,alpha=0.16``; None where there is only one.
    Raises:
        StalenessError: there is none, or there are several and none was named.
    """
    where = f"{artifact.path}: at the stage {stage.value!r} in the format {text_format.value!r}"
    there = [item for item in artifact.card.calibrations if item.stage is stage and item.format is text_format]
    names = ", ".join(as_option(item.aggregate) for item in there)
    if not there:
        raise StalenessError(f"{where} it is not calibrated, so no threshold can go stale. Calibrate it first.")
    chosen = [item for item in there if aggregate is None or as_option(item.aggregate) == aggregate]
    if len(chosen) != 1:
        raise StalenessError(
            f"{where} it is calibrated for {names}, and {'none' if aggregate is None else repr(aggregate)} was named. "
            "Name one of these with --aggregate."
        )
    return chosen[0]
