"""Fits the direction along which activations move when a text takes the model off its task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from probes.artifact import Artifact
from probes.card import Format, Stage
from probes.errors import TelltaleError
from probes.fit.evaluation.baselines import labels_of
from probes.fit.evaluation.measure import Estimate, Measurer
from probes.fit.fitters import Fitter
from probes.fit.rows.example import Example, data_digest
from probes.fit.training.linear_probe import Floats, Labels
from probes.fit.training.making import Making
from probes.speaker import Speaker
from probes.taps import Tap

__all__ = ["DriftError", "fit_drift", "make_drift"]

_NORM_TEST_ROWS = 32
_FOLDS = 5


class DriftError(TelltaleError, ValueError):
    """The rows do not show what a text changes."""


def fit_drift(before: Floats, after: Floats, labels: Labels, *, fitter: Fitter) -> dict[str, npt.NDArray[np.float32]]:
    """Direction and scale, as an artifact of kind ``drift`` holds them.

    What the fitter's mean and bias say is left out: a rule's threshold says it.

    Args:
        before: (n, d_model), of each request the row before the text that nobody vouches for.
        after: (n, d_model), the last row of that text.
        labels: (n,), 1 where the text took the model off its task; both present.
        fitter: of the direction in the differences (Abdelnabi et al., arXiv 2406.00799).
    """
    probe = fitter.fit(after.astype(np.float64) - before.astype(np.float64), labels)
    return {"direction": probe.direction, "scale": probe.scale}


def make_drift(making: Making, rows: Sequence[Example], *, segments: Sequence[Speaker], fitter: Fitter) -> Artifact:
    """A detector of texts that take the model off its task: see ``probes.detectors.drift``.

    How well it does on groups of rows that it was not fitted on stands on its card.

    Args:
        making: for what.
        rows: conversations, label 1 where what one of ``segments`` says took the model off its task.
        segments: whose texts nobody vouches for.
        fitter: of the direction.
    Raises:
        DriftError: a label is missing, or a row has no such text, or nothing before it.
        TelltaleError: the model cannot be read, or its template changes a text.
    """
    labels = labels_of(rows)
    if not 0 < labels.sum() < labels.size:
        raise DriftError(
            f"{int(labels.sum())} of {labels.size} rows are labelled 1. Both labels are needed: texts that take the "
            "model off its task, and texts that do not."
        )
    reader = making.reader()
    skip_first = reader.sink_positions(rows[:_NORM_TEST_ROWS], Format.CHAT)
    requests = reader.render(rows, text_format=Format.CHAT, stage=Stage.PROMPT, segments=segments)
    names = ", ".join(segments)
    before, after = (np.empty((len(rows), reader.model.d_model), dtype=np.float32) for _ in range(2))
    for number, found in reader.sweep(requests, [Tap(making.layer)], label="rows"):
        positions = requests[number].positions(skip_first)
        if len(positions) == 0 or positions[0] <= skip_first:
            what = "nothing that is read stands before" if len(positions) else "there is no"
            raise DriftError(
                f"row {number + 1} ({rows[number].source!r}, group {rows[number].group!r}): {what} text of {names}. "
                'A row is {"messages": [{"role": "user", ...}, {"role": "tool", ...}], "label": 1}: the task first, '
                "then the text."
            )
        before[number], after[number] = (found[Tap(making.layer)][place] for place in (positions[0] - 1, positions[-1]))
    evaluation = _held_out(before, after, rows, fitter)
    if evaluation:
        making.progress(f"AUROC on groups that were held out (95 % interval): {evaluation['auroc']}")
    else:
        making.progress(
            f"fewer than {_FOLDS} groups of a label: none are held out, so nobody knows how well it does. Name groups: "
            "rows with one 'group' belong together, those without are grouped by their newest message"
        )
    training = {
        "data_digest": data_digest(rows),
        "rows": len(rows),
        "segments": [speaker.value for speaker in segments],
        "fitter": fitter.config(),
    }
    return making.finish(
        reader,
        "drift",
        fit_drift(before, after, labels, fitter=fitter),
        skip_first=skip_first,
        training=training,
        evaluation={"held_out_groups": evaluation} if evaluation else {},
        formats=(Format.CHAT,),
        segments=segments,
    )


def _held_out(before: Floats, after: Floats, rows: Sequence[Example], fitter: Fitter) -> dict[str, Any]:
    """AUROC with its interval, each fifth of the groups scored by a fit on the others; empty with too few groups."""
    labels, groups = labels_of(rows), [row.group for row in rows]
    fewest = min(len({row.group for row in rows if row.label == label}) for label in (0, 1))
    if fewest < _FOLDS:
        return {}
    moved = after.astype(np.float64) - before.astype(np.float64)
    scores = np.empty(len(rows))
    for train, test in StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=0).split(moved, labels, groups):
        probe = fitter.fit(moved[train], labels[train])
        # Of each fit only the order counts: its scores are put in units of its own harmless rows.
        harmless = probe.score(moved[train][labels[train] == 0])
        scores[test] = (probe.score(moved[test]) - harmless.mean()) / (harmless.std() or 1.0)
    found: Estimate = Measurer(labels, groups, seed=0).quality(scores).auroc
    return {"auroc": found.rounded(), "rows": len(rows), "groups": len(set(groups)), "folds": _FOLDS}
