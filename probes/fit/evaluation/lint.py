"""Refuses a report that lacks what makes its figures mean something: n, intervals, controls, split policy."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from probes.errors import TelltaleError
from probes.fit.evaluation.controls import REQUIRED
from probes.fit.evaluation.evaluation import FormatReport, Report, SplitPolicy

__all__ = ["ReportError", "lint", "read_report"]

_WHAT = {
    "num_positive": "n",
    "num_negative": "n",
    "num_groups": "n",
    "rows": "n",
    "low": "intervals",
    "high": "intervals",
    "detector": "the detector's figures",
    "controls": "controls",
    "split": "split policy",
    "policy": "split policy",
    "removed": "split policy",
}
"""What a missing field is a part of."""


class ReportError(TelltaleError, ValueError):
    """A report cannot be read, or lacks what it must not lack."""


def read_report(path: Path) -> Report:
    """Read a report that lacks nothing.

    Raises:
        ReportError: the file is no report, or something is missing; the text names all of it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read ({error}). Pass a file that `telltale eval` wrote.") from error
    try:
        report = Report.model_validate(content)
    except ValidationError as error:
        missing = [problem for problem in error.errors() if problem["type"] == "missing"]
        if missing:
            raise ReportError(_refusal(path, [_missing(problem["loc"]) for problem in missing])) from error
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(
            f"{path}: {where or 'the file'}: {first['msg']}. It was edited or written by another version: run "
            "`telltale eval` again."
        ) from error
    if findings := lint(report):
        raise ReportError(_refusal(path, findings))
    return report


def lint(report: Report) -> list[str]:
    """What a report lacks, one entry each; empty if nothing."""
    findings = []
    if report.split.policy is SplitPolicy.UNCHECKED:
        findings.append(
            "split policy: nobody has checked that the measured rows were not trained on. Give the training rows "
            "(telltale eval --train)"
        )
    for text_format, found in report.formats.items():
        findings += [f"{text_format.value}: {finding}" for finding in _of_format(found)]
    return findings


def _of_format(found: FormatReport) -> list[str]:
    table = found.table
    present = {row.name for row in table.controls} | {band.name.value for band in table.bands}
    reasons = {absent.name: absent.reason for absent in table.absent}
    needless = {absent.name for absent in table.absent if not absent.applies}
    findings = []
    for names in REQUIRED:
        if any(name.value in present or name in needless for name in names):
            continue
        why = next((f" ({reasons[name]})" for name in names if name in reasons), "")
        findings.append(f"controls: {' or '.join(name.value for name in names)} is missing{why}")
    for row in (table.detector, *table.controls):
        findings += [
            f"intervals: TPR at {rate.target_fpr:g} of {row.name} has neither a figure nor a reason"
            for rate in row.tpr
            if rate.tpr is None and not rate.reason
        ]
        if not row.tpr:
            findings.append(f"intervals: {row.name} has no TPR at a false-positive rate")
    return findings


def _missing(place: tuple[int | str, ...]) -> str:
    what = next((_WHAT[part] for part in reversed(place) if isinstance(part, str) and part in _WHAT), "a field")
    return f"{what}: {'.'.join(map(str, place))} is missing"


def _refusal(path: Path, findings: list[str]) -> str:
    listed = "\n".join(f"  * {finding}" for finding in findings)
    return f"{path}: refused, {len(findings)} of what a report must say is missing:\n{listed}"
