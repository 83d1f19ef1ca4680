"""Binds a detector to the build on which a check has found that it holds."""

from __future__ import annotations

from collections.abc import Sequence

from probes.artifact import Artifact
from probes.fit.staleness.check import CheckReport
from probes.fit.staleness.decision import Verdict
from probes.fit.staleness.reference import artifact_digest, as_option, calibration_of
from probes.fit.staleness.rows import StalenessError

__all__ = ["adopt"]


def adopt(artifact: Artifact, reports: Sequence[CheckReport], *, created_by: str) -> Artifact:
    """The detector with a card that names the checked build; its tensors are the same.

    A calibration whose check came to PASS stays; others, and the canary, belong to the old build and are left out.

    Args:
        artifact: of the old build.
        reports: of checks of it on one new build, one for each stage and format.
        created_by: version that writes.
    Returns: in memory.

    Raises:
        StalenessError: a report is of another artifact or build, or neither PASS nor STALE.
    """
    for report in reports:
        _require_of(artifact, report, reports[0])
    passed = [report for report in reports if report.decision.verdict is Verdict.PASS]
    kept = tuple(
        calibration_of(artifact, report.stage, report.format, as_option(report.aggregate))
        for report in {(item.stage, item.format, as_option(item.aggregate)): item for item in passed}.values()
    )
    card = artifact.card
    checks = [
        {
            "verdict": report.decision.verdict.value,
            "from": {"tensors_digest": card.tensors_digest, "model": report.model_before.model_dump(mode="json")},
            "stage": report.stage.value,
            "format": report.format.value,
            "data_digest": report.data_digest,
            "reference_digest": report.reference_digest,
            "comparison": report.comparison.model_dump(mode="json"),
        }
        for report in reports
    ]
    changed = {
        "model": reports[0].model_after,
        "calibrations": kept,
        "formats": tuple(dict.fromkeys(item.format for item in kept)) or card.formats,
        "canary": None,
        "evaluation": {},
        "training": {**card.training, "adopted": checks},
        "created_by": created_by,
    }
    return Artifact(artifact.path, card.model_copy(update=changed), artifact.tensors)


def _require_of(artifact: Artifact, report: CheckReport, first: CheckReport) -> None:
    where = f"{artifact.path}: the report at {report.stage.value!r} in the format {report.format.value!r}"
    if report.artifact_digest != artifact_digest(artifact):
        raise StalenessError(f"{where} is of another artifact. Name the report of a check of this one.")
    if report.model_after != first.model_after:
        raise StalenessError(f"{where} is of another build than the first one. Adopt one build at a time.")
    if not report.changes:
        raise StalenessError(f"{where}: the build is the one on the card, so there is nothing to adopt.")
    verdict = report.decision.verdict
    if verdict not in {Verdict.PASS, Verdict.STALE}:
        way = (
            "Repair it (telltale gate repair) or train again."
            if verdict is Verdict.DEGRADED
            else "Check with more rows."
        )
        raise StalenessError(f"{where} came to {verdict.value}: only after PASS or STALE it is adopted. {way}")
