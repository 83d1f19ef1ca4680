"""The short form of a report, as a detector's card holds it."""

from __future__ import annotations

from typing import Any

from probes.artifact import Artifact, write_card
from probes.fit.evaluation.evaluation import FormatReport, Report

__all__ = ["CARD_KEY", "write_on_card"]

CARD_KEY = "eval"
"""Under ``evaluation`` of the detector's card; by stage and format in it."""


def write_on_card(artifact: Artifact, report: Report) -> None:
    """Write a report's figures onto the card; those of another stage or format stay, and so do the tensors."""
    card = artifact.card
    entries = {
        f"{report.stage.value}/{text_format.value}": _entry(report, found)
        for text_format, found in report.formats.items()
    }
    evaluation = {**card.evaluation, CARD_KEY: {**card.evaluation.get(CARD_KEY, {}), **entries}}
    write_card(artifact.path, card.model_copy(update={"evaluation": evaluation}))


def _entry(report: Report, found: FormatReport) -> dict[str, Any]:
    left_out = found.leave_one_out
    trained_on = report.training_data
    return {
        "data_digest": report.data.digest,
        "training_data_digest": None if trained_on is None else trained_on.digest,
        "split": report.split.policy.value,
        "seed": report.seed,
        "num_groups": found.table.num_groups,
        **found.table.card(),
        "leave_one_source_out": None if left_out is None else {"auroc": left_out.detector.rounded()},
        "in_distribution": None if found.in_distribution is None else {"auroc": found.in_distribution.rounded()},
        "verdict": found.verdict.grade.value,
        "verdict_reasons": list(found.verdict.reasons),
    }
