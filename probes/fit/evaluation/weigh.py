"""Which figures a verdict rests on: rows of unseen sources before a fold's, and those before rows of known sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from probes.fit.evaluation.controls import TEXT_PEERS, TRIVIAL, Control
from probes.fit.evaluation.evaluation import LeaveOneOut, SplitPolicy, Table
from probes.fit.evaluation.measure import Estimate
from probes.fit.evaluation.verdict import Evidence, Trivial, Verdict, decide

__all__ = ["Home", "weigh", "weigh_folds"]

_RESTS_ON = {
    SplitPolicy.HELD_OUT_SOURCES: "the measured rows; no source of theirs was trained on",
    SplitPolicy.GROUPED: "the measured rows; their sources were trained on too, their groups and texts were not",
    SplitPolicy.UNCHECKED: "the measured rows; nobody has checked that they were not trained on",
}
_LEFT_OUT = "the folds with one source of the training rows left out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """What is known of the rows that the detector was fitted on.

    Attributes:
        leave_one_out: the fit with each source held out.
        in_distribution: AUROC of the fit where the rows are split at random.
        trivial: AUROC of length and question mark on them.
    """

    leave_one_out: LeaveOneOut | None = None
    in_distribution: Estimate | None = None
    trivial: Mapping[Control, float] = field(default_factory=dict)


def weigh(table: Table, policy: SplitPolicy, home: Home) -> Verdict:
    """The verdict on a detector.

    Rows of sources that were not trained on decide, since it is the detector itself that is measured there. Otherwise
    the folds with a source left out do, where there are any.

    Args:
        table: figures on the measured rows.
        policy: how these are kept apart from the training rows.
        home: what is known of the training rows.
    """
    unseen = policy is SplitPolicy.HELD_OUT_SOURCES
    left_out = home.leave_one_out
    away = [table.detector.auroc.value] if unseen else []
    if left_out is not None:
        away.append(left_out.detector.value)
    if left_out is not None and not unseen:
        detector, rests_on = left_out.detector, _LEFT_OUT
        texts = {control: estimate.value for control, estimate in left_out.peers.items()}
    else:
        detector, rests_on = table.detector.auroc, _RESTS_ON[policy]
        texts = {name: row.auroc.value for name in (*TEXT_PEERS, *TRIVIAL) if (row := table.control(name))}
    trivial = {
        name: Trivial(row.auroc, row.difference)
        for name in TRIVIAL
        if (row := table.control(name)) and row.difference is not None
    }
    return decide(
        Evidence(
            detector=detector,
            rests_on=rests_on,
            texts=texts,
            trivial=trivial,
            in_distribution=home.in_distribution.value if home.in_distribution else None,
            out_of_source=min(away, default=None),
            trivial_in_training=home.trivial,
        )
    )


def weigh_folds(home: Home) -> Verdict | None:
    """The verdict where nothing but the training rows was measured; None where no source could be left out.

    Args:
        home: what is known of the training rows.
    """
    left_out = home.leave_one_out
    if left_out is None:
        return None
    return decide(
        Evidence(
            detector=left_out.detector,
            rests_on=_LEFT_OUT,
            texts={control: estimate.value for control, estimate in left_out.peers.items()},
            trivial={},
            in_distribution=home.in_distribution.value if home.in_distribution else None,
            out_of_source=left_out.detector.value,
            trivial_in_training=home.trivial,
        )
    )
