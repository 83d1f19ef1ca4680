"""A report as one HTML page that needs nothing else: plots inside, no script, every text escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.evaluation import Report, Share
from probes.fit.evaluation.measure import Estimate
from probes.fit.evaluation.plots import Plot, draw_format, draw_sweep
from probes.fit.rows.slices import SliceKey

__all__ = ["render_page"]

_TEMPLATE = "report_page.html"
_TOLD = {
    Control.TF_IDF: "TF-IDF (words 1-2, characters 3-5) and logistic regression, trained on the training rows",
    Control.SENTENCE_EMBEDDING: "sentence embedding (all-MiniLM-L6-v2) and logistic regression, trained likewise",
    Control.BAG_OF_EMBEDDINGS: "mean of the served model's input embeddings and logistic regression, trained likewise",
    Control.LENGTH_ONLY: "characters, in the direction that suits them better on these very rows",
    Control.QUESTION_MARK_ONLY: "whether the text ends with one, likewise",
    Control.SHUFFLED_LABELS: "the detector's own fit on permuted labels",
    Control.RANDOM_DIRECTION: "random directions at the detector's tap",
    Control.RANDOM_INIT: "the detector's own fit on the same architecture with random weights",
}


def render_page(report: Report) -> str:
    """The page; the same report gives the same text.

    Args:
        report: that the lint has passed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"interval": _interval, "share": _share, "percent": _percent, "svg": _svg}
    sweep = draw_sweep(report.layer_sweep)
    page: str = environment.get_template(_TEMPLATE).render(
        report=report,
        plots={
            text_format: draw_format(found, name=text_format.value) for text_format, found in report.formats.items()
        },
        sweep=sweep,
        keys=list(SliceKey),
        told={control.value: _TOLD[control] for control in Control},
    )
    return page


def _interval(found: Estimate | None) -> str:
    return "-" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _share(found: Share | None) -> str:
    if found is None:
        return "-"
    return f"{found.count} of {found.of}: {found.count / found.of:.1%} ({found.low:.1%} to {found.high:.1%})"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _svg(plot: Plot) -> Markup:
    # Drawn by ourselves, and escaped there.
    return Markup(plot.svg)  # noqa: S704
