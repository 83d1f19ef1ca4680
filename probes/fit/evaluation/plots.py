"""Plots of a report as SVG that stands inside a page: no script, no font, no address from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probes.fit.evaluation.controls import TEXT_PEERS, Control
from probes.fit.evaluation.evaluation import FormatReport, Row, SweepPoint
from probes.fit.rows.slices import SliceKey

__all__ = ["Plot", "draw_format", "draw_sweep"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
_STYLES = ((_BLUE, "-"), (_ORANGE, "--"), (_GREEN, "-."), (_RED, ":"))
_LEAST_FPR = 1e-3


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of the page.

    Attributes:
        title: above it.
        svg: the element, ids and text already safe to stand in a page.
        caption: below it: what is to be seen, in words.
    """

    title: str
    svg: str
    caption: str


def draw_format(found: FormatReport, *, name: str) -> list[Plot]:
    """The plots of one format.

    Args:
        found: its figures.
        name: of the format: ids begin with it.
    """
    plots = [_roc(found, f"{name}-roc"), _histogram(found, f"{name}-histogram")]
    if plot := _false_alarms(found, f"{name}-length"):
        plots.append(plot)
    if plot := _reliability(found, f"{name}-reliability"):
        plots.append(plot)
    return plots


def draw_sweep(points: Sequence[SweepPoint]) -> Plot | None:
    """The best AUROC of each layer in training's search; None where the card does not name two layers."""
    best: dict[int, float] = {}
    for point in points:
        best[point.layer] = max(point.auroc, best.get(point.layer, 0.0))
    if len(best) < 2:  # noqa: PLR2004 - one point is no curve
        return None
    layers = sorted(best)
    top = max(layers, key=lambda layer: best[layer])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(layers, [best[layer] for layer in layers], color=_BLUE, marker="o")
        axes.set(xlabel="layer", ylabel="mean AUROC over the folds")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    caption = (
        f"{len(layers)} layers that the search tried; best: layer {top} with a mean AUROC of {best[top]:.3f} over its "
        "folds. The search chose by these figures, so they flatter."
    )
    return Plot("Layers", _svg(draw, "sweep", caption, (6.0, 3.0)), caption)


def _roc(found: FormatReport, name: str) -> Plot:
    peers = [found.table.control(control) for control in (*TEXT_PEERS, Control.LENGTH_ONLY)]
    rows = [found.table.detector, *[row for row in peers if row is not None]]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for row, (color, style) in zip(rows, _STYLES, strict=False):
            curve, label = row.curve, _label(row)
            left.plot(curve.fpr, curve.tpr, color=color, linestyle=style, label=label, drawstyle="steps-post")
            fpr = [max(rate, _LEAST_FPR) for rate in curve.fpr]
            right.plot(fpr, curve.tpr, color=color, linestyle=style, drawstyle="steps-post")
        left.plot([0, 1], [0, 1], color=_GREY, linewidth=0.7)
        left.set(xlabel="false-positive rate", ylabel="true-positive rate", title="all thresholds", ylim=(0, 1.02))
        right.set(xscale="log", xlim=(_LEAST_FPR, 1), xlabel="false-positive rate", title="few false alarms")
        right.set(ylim=(0, 1.02))
        left.legend(fontsize="small", loc="lower right")

    caption = "; ".join(f"{row.name}: AUROC {row.auroc.value:.3f}" for row in rows) + "."
    return Plot("ROC", _svg(draw, name, caption, (9.0, 3.6)), caption)


def _histogram(found: FormatReport, name: str) -> Plot:
    counts, threshold = found.histogram, found.threshold

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for values, color, label in (
            (counts.negatives, _GREY, "negative"),
            (counts.positives, _BLUE, "positive"),
        ):
            total = max(1, sum(values))
            axes.stairs(
                [value / total for value in values], counts.edges, fill=True, alpha=0.5, color=color, label=label
            )
        if not threshold.by_length:
            axes.axvline(threshold.threshold, color=_RED, linestyle="--", label="threshold")
        axes.set(xlabel="statistic", ylabel="share of the label's rows")
        axes.legend(fontsize="small")

    place = "their thresholds, which depend on length" if threshold.by_length else f"{threshold.threshold:.3g}"
    caption = (
        f"Statistics of {sum(counts.positives)} positive and {sum(counts.negatives)} negative rows. Above {place}: "
        f"{threshold.caught.count} positive and {threshold.false_alarms.count} negative ones."
    )
    return Plot("Statistics by label", _svg(draw, name, caption, (6.0, 3.0)), caption)


def _false_alarms(found: FormatReport, name: str) -> Plot | None:
    parts = [
        (part.value, part.false_alarms)
        for part in found.slices
        if part.key is SliceKey.LENGTH and part.false_alarms is not None
    ]
    threshold = found.threshold
    if not parts:
        return None
    rates = [share.count / share.of for _, share in parts]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(len(parts))
        below = [rate - share.low for rate, (_, share) in zip(rates, parts, strict=True)]
        above = [share.high - rate for rate, (_, share) in zip(rates, parts, strict=True)]
        axes.errorbar(places, rates, yerr=[below, above], fmt="o", color=_BLUE, capsize=3)
        axes.axhline(threshold.target_fpr, color=_RED, linestyle="--", label=f"promised: {threshold.target_fpr:g}")
        axes.set(xlabel="tokens that are read", ylabel="false-positive rate", ylim=(0, None))
        axes.set_xticks(places, [value for value, _ in parts])
        axes.legend(fontsize="small")

    listed = "; ".join(f"{value} tokens: {share.count} of {share.of}" for value, share in parts)
    caption = f"False alarms at the threshold, with exact 95 % intervals. {listed}."
    return Plot("False alarms by length", _svg(draw, name, caption, (6.0, 3.0)), caption)


def _reliability(found: FormatReport, name: str) -> Plot | None:
    report = found.reliability
    if report is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.7)
        axes.plot(
            [part.mean_probability for part in report.bins],
            [part.share_positive for part in report.bins],
            color=_BLUE,
            marker="o",
        )
        axes.set(xlabel="probability that was said", ylabel="share that was positive", xlim=(0, 1), ylim=(0, 1))

    caption = (
        f"Calibrated probabilities in {len(report.bins)} bins of equal mass, expected calibration error "
        f"{report.error:.3f}, Brier score {report.brier.value:.3f}, at this set's share of positives."
    )
    return Plot("Reliability", _svg(draw, name, caption, (4.0, 3.6)), caption)


def _label(row: Row) -> str:
    return f"{row.name.replace('_', ' ')} ({row.auroc.value:.3f})"


def _svg(draw: Callable[[Figure], None], name: str, caption: str, size: tuple[float, float]) -> str:
    """The drawing as one element, its ids prefixed so that several may stand in one page."""
    written = io.StringIO()
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "telltale", "font.size": 9.0, "axes.grid": True, "grid.alpha": 0.3}
    ):
        # Not pyplot: it keeps figures in a global list, and would look for a screen.
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing)
    text = written.getvalue()
    element = text[text.index("<svg") :]
    # A page knows SVG without its namespaces, and shall name no address.
    element = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
