"""Records what a detector says on the build of its card, and judges it on another one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from probes.aggregate import AnyAggregator
from probes.artifact import Artifact
from probes.card import Digest, Format, ModelRef, Stage
from probes.fit.staleness.changes import Change, installed_libraries, library_changes, model_changes
from probes.fit.staleness.comparison import Comparison, compare
from probes.fit.staleness.decision import Claim, Decision, Margins, decide
from probes.fit.staleness.reference import Reference, calibration_of
from probes.fit.staleness.rows import BuildReader, Rows, StalenessError, read_build

__all__ = ["CheckReport", "check", "record", "require_readable"]

_SEED = 0


class CheckReport(BaseModel):
    """What was found on a new build. It holds no text of any row."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    detector: str
    artifact_digest: Digest
    reference_digest: Digest
    data_digest: Digest
    stage: Stage
    format: Format
    aggregate: AnyAggregator
    claim: Claim
    margins: Margins
    model_before: ModelRef
    model_after: ModelRef
    changes: tuple[Change, ...] = Field(description="of the model")
    library_changes: tuple[Change, ...] = Field(description="of what runs it")
    read_by: str = Field(description="what computed the activations of the new build")
    tokens_changed: int = Field(ge=0, description="requests that reach the model as other tokens")
    comparison: Comparison
    decision: Decision
    seed: int
    created_by: str

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> CheckReport:
        """Read what ``write`` wrote.

        Raises:
            StalenessError: it cannot be read, or is no report of this version.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            problem = str(error).splitlines()[0]
            raise StalenessError(
                f"{path}: no report of a check ({problem}). Name what `telltale gate check --out` wrote."
            ) from error


def record(
    artifact: Artifact,
    rows: Rows,
    reader: BuildReader,
    *,
    stage: Stage,
    text_format: Format,
    aggregate: str | None,
    read_by: str,
    created_by: str,
) -> Reference:
    """What a detector says on the build of its card.

    Args:
        artifact: of the detector.
        rows: requests.
        reader: of the model on the card.
        stage: when it is judged.
        text_format: how texts reach the model.
        aggregate: as on the command line, ``ema,alpha=0.16``; None where the card has one calibration for stage and format.
        read_by: what the reader is.
        created_by: version that records.
    Raises:
        StalenessError: it is not calibrated for stage and format.
    """
    calibration = calibration_of(artifact, stage, text_format, aggregate)
    return Reference.of(
        artifact,
        calibration,
        rows,
        read_build(artifact, rows.examples, reader, calibration, label="recorded build"),
        libraries=installed_libraries(),
        read_by=read_by,
        seed=_SEED,
        created_by=created_by,
    )


def check(
    artifact: Artifact,
    reference: Reference,
    rows: Rows,
    reader: BuildReader,
    *,
    model: ModelRef,
    margins: Margins,
    read_by: str,
    created_by: str,
) -> CheckReport:
    """Score the recorded requests on another build, and judge.

    Args:
        artifact: the one that was recorded.
        reference: see ``record``.
        rows: those that were recorded.
        reader: of the new build.
        model: which build that is.
        margins: how much may be lost.
        read_by: what the reader is.
        created_by: version that checks.
    Raises:
        StalenessError: artifact or rows are not the recorded ones, or the detector cannot read this model at all.
    """
    calibration = reference.require(artifact, rows)
    require_readable(artifact, model)
    readings = read_build(artifact, rows.examples, reader, calibration, label="new build")
    claim = reference.claim
    found = compare(reference.pairs(readings), confidence=claim.confidence, seed=_SEED)
    return CheckReport(
        detector=reference.detector,
        artifact_digest=reference.artifact_digest,
        reference_digest=reference.digest(),
        data_digest=reference.data_digest,
        stage=reference.stage,
        format=reference.format,
        aggregate=reference.aggregate,
        claim=claim,
        margins=margins,
        model_before=reference.model,
        model_after=model,
        changes=model_changes(reference.model, model),
        library_changes=library_changes(reference.libraries, installed_libraries()),
        read_by=read_by,
        tokens_changed=sum(old != new for old, new in zip(reference.tokens, readings.tokens, strict=True)),
        comparison=found,
        decision=decide(found, claim, margins),
        seed=_SEED,
        created_by=created_by,
    )


def require_readable(artifact: Artifact, model: ModelRef) -> None:
    """Refuse a model in which the detector's directions mean nothing.

    Raises:
        StalenessError: it has another width, or too few layers.
    """
    card = artifact.card
    if model.d_model != card.model.d_model:
        raise StalenessError(
            f"{artifact.path}: reads streams {card.model.d_model} wide, those of {model.id!r} are {model.d_model} "
            "wide: another architecture, not another build. Train a detector on it (telltale train)."
        )
    if beyond := [str(tap) for tap in artifact.taps if tap.layer >= model.num_layers]:
        raise StalenessError(
            f"{artifact.path}: reads {', '.join(beyond)}; {model.id!r} has the layers 0 to {model.num_layers - 1}. "
            "Train a detector on it (telltale train)."
        )
