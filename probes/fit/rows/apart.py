"""Sets that a finished detector is measured on, each by itself: what the recipe names under ``development.apart``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probes.card import Calibration
from probes.fit.evaluation.baselines import TextPeer
from probes.fit.evaluation.evaluate import ScoredRows, at_threshold, compare, labels_of, limits_of
from probes.fit.training.search import Probe
from probes.fit.training.session import FitSession, statistics_of

__all__ = ["measure_apart"]


def measure_apart(
    session: FitSession, probe: Probe, calibration: Calibration, *, peers: Sequence[TextPeer]
) -> dict[str, Any]:
    """Figures by name of the set, beside the text baselines, in the format of one calibration.

    Of a set with one label alone there is only the number of rows that fire.

    Args:
        session: rows and reader, finished.
        probe: the detector.
        calibration: its threshold.
        peers: the text-only classifiers that it is held against.
    """
    report: dict[str, Any] = {}
    for name, rows in session.data.apart.items():
        labels = labels_of(rows)
        if session.finished is None or labels.size == 0:
            continue
        read = session.read(rows, calibration.format, f"{name} rows")
        statistics = statistics_of(probe, read, session.finished)
        limits = limits_of(calibration, session.lengths(rows, calibration.format))
        fired = at_threshold(calibration, {name: (statistics, limits, labels)})
        if labels.min() == labels.max():
            report[name] = {"at_threshold": fired[name]}
            continue
        tested = ScoredRows(
            examples=rows,
            scores=statistics,
            peers={peer.control: peer.scores(session.data.train, rows) for peer in peers},
        )
        report[name] = compare(tested, seed=session.recipe.seed).card() | {"at_threshold": fired[name]}
    return {"apart": report} if report else {}
