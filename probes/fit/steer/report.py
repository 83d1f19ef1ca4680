"""The report on a steering direction: Markdown with its table, a plot, and the figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probes.fit.evaluation.measure import Estimate
from probes.fit.steer.behaviour import MIN_AUROC
from probes.fit.steer.dose_response import ANTI_STEERED_BY, Condition, DoseResponse
from probes.fit.steer.evaluation import SteerEvaluation
from probes.fit.steer.side_effects import harmless_prompts
from probes.fit.steer.verdict import LIMITS
from probes.steering.base import Sign

__all__ = ["response_table", "write_report"]

_HEAD = (
    "condition",
    "strength",
    "P(target)",
    "gain over plain",
    "anti-steered",
    "over-refusal",
    "KL",
    "CE change",
    "distinct-2",
    "longest repeat",
    "dose",
)
_NAMES = {"plain": "plain", "instruction": "prompt only", "steer": "**steer**", "random": "random"}
_SAMPLE_LENGTH = 160


def write_report(evaluation: SteerEvaluation, folder: Path, *, command: str) -> Path:
    """Write ``<name>.md``, ``<name>.png`` and ``<name>.json``.

    Args:
        evaluation: what is reported.
        folder: made if needed.
        command: that repeats it.
    Returns: the path of the Markdown file.
    """
    name = evaluation.artifact.card.name
    folder.mkdir(parents=True, exist_ok=True)
    figures = json.dumps(evaluation.as_dict(), indent=2, ensure_ascii=False) + "\n"
    (folder / f"{name}.json").write_text(figures, encoding="utf-8")
    _draw(evaluation, folder / f"{name}.png")
    path = folder / f"{name}.md"
    path.write_text(_markdown(evaluation, command), encoding="utf-8")
    return path


def _markdown(evaluation: SteerEvaluation, command: str) -> str:
    card, trial, verdict = evaluation.artifact.card, evaluation.trial, evaluation.verdict
    recommended = "none" if verdict.recommended is None else f"{verdict.recommended:g}"
    shows = "shows" if trial.operators[0].sign is Sign.MORE else "lacks"
    parts = [
        f"# Steering evaluation: {card.name}",
        f"{datetime.now(UTC):%Y-%m-%d}, {card.model.id}, `{trial.operators[0].kind}` at {card.tap}, "
        f"positions `{trial.positions.value}`. {card.description}",
        f"**Verdict: `{verdict.grade.value}`; recommended strength: {recommended}.**",
        "\n".join(f"* {reason}" for reason in verdict.reasons),
        _direction(evaluation),
        response_table(evaluation.response),
        f"![P(target), KL and distinct-2 by strength]({card.name}.png)",
        "## What stands in the table",
        "\n".join(_legend(evaluation, shows)),
        "## Replies",
        _samples(evaluation),
        "## To repeat it",
        f"```bash\n{command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _legend(evaluation: SteerEvaluation, shows: str) -> list[str]:
    trial, judge = evaluation.trial, evaluation.judge
    seen = "the pairs that gave the direction" if evaluation.same_texts else "texts that the direction does not rest on"
    limits = LIMITS
    return [
        f"* P(target): that a reply {shows} the behaviour, by a judge that reads text alone (TF-IDF and logistic "
        f"regression, {judge.examples} examples: {seen}). Its AUROC on groups that it has not seen: "
        f"{_estimate(judge.auroc)}; below {MIN_AUROC} the verdict is `reject`.",
        f"* {len(trial.prompts)} prompts, greedy replies of at most {trial.max_tokens} tokens; bootstrap 95 % "
        "intervals over prompts. Gain: the difference to the same prompt's plain reply.",
        f"* Anti-steered: share of prompts whose P(target) falls by more than {ANTI_STEERED_BY}. Over-refusal: share "
        f"of {len(harmless_prompts())} harmless prompts that sound dangerous and are refused, by a list of phrases.",
        "* KL(plain || steered) and change of cross-entropy: nats a token, on the second half of "
        f"{trial.neutral_lines} lines of ordinary text, as if it were generated after the first.",
        "* Distinct-2: share of neighbouring token pairs that differ, mean over replies. Longest repeat: tokens that "
        "say at once again what was just said, mean over replies.",
        f"* Random: {trial.seeds} directions of the same length, each row given the same dose as by the steer; means, "
        "and the band of their P(target) (all of them and two standard deviations).",
        f"* Prompt only: the system message {json.dumps(trial.instruction, ensure_ascii=False)}. Dose: median norms "
        "a written row.",
        "* `ship` needs, at one strength, a gain surely above 0 and above the random band, no less than by prompt, "
        f"KL at most {limits.kl}, distinct-2 at least {limits.distinct_2:.0%} of plain, at most "
        f"{limits.anti_steered:.0%} anti-steered, over-refusal up by at most {limits.over_refusal * 100:g} points. "
        "`assist`: a real effect, but a prompt does more, or a limit is exceeded while the text does not degenerate.",
    ]


def _direction(evaluation: SteerEvaluation) -> str:
    card = evaluation.artifact.card
    quality = {f"{name} of pairs": value for name, value in card.evaluation.get("pairs", {}).items() if name != "pairs"}
    found = {**card.training, **quality}
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in found.items()
        if not name.endswith("_digest") and value is not None
    )
    return f"The direction: {settings}." if settings else "Nobody has written down where the direction comes from."


def response_table(response: DoseResponse) -> str:
    """All conditions, as a table of Markdown."""
    rows = [_row(response.plain), _row(response.instruction)]
    for steered, random in zip(response.steered, response.random, strict=True):
        rows += [_row(steered), _row(random)]
    return "\n".join([_line(_HEAD), _line(["---"] * len(_HEAD)), *map(_line, rows)])


def _row(condition: Condition) -> list[str]:
    found = condition.figures
    target = _estimate(found.target)
    if condition.spread is not None:
        target = f"{found.target.value:.3f} [{condition.spread.low:.3f} to {condition.spread.top:.3f}]"
    return [
        _NAMES[condition.name],
        "" if condition.strength is None else f"{condition.strength:g}",
        target,
        "" if condition.name == "plain" else _estimate(found.gain, sign="+"),
        f"{found.anti_steered:.0%}",
        f"{found.over_refusal:.0%}",
        "" if found.kl is None else f"{found.kl:.3f}",
        "" if found.ce_change is None else f"{found.ce_change:+.3f}",
        f"{found.distinct_2:.2f}",
        f"{found.longest_repeat:.1f}",
        f"{found.dose:.3f}",
    ]


def _samples(evaluation: SteerEvaluation) -> str:
    response = evaluation.response
    parts = []
    for condition in (response.plain, response.instruction, *response.steered):
        at = "" if condition.strength is None else f" at {condition.strength:g}"
        lines = [
            f"  * {json.dumps(prompt, ensure_ascii=False)} → {_shown(reply)}"
            for prompt, reply in zip(evaluation.trial.prompts, condition.samples, strict=False)
        ]
        parts.append("\n".join([f"* {_NAMES[condition.name].strip('*')}{at}", *lines]))
    return "\n".join(parts)


def _shown(reply: str) -> str:
    text = " ".join(reply.split())
    # No mark of Markdown in a reply may change the page.
    text = text.replace("`", "'")
    return f"`{text[:_SAMPLE_LENGTH]}{'...' if len(text) > _SAMPLE_LENGTH else ''}`"


def _estimate(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _draw(evaluation: SteerEvaluation, path: Path) -> None:
    # Not pyplot: it keeps figures in a global list, and would look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    response = evaluation.response
    x = [condition.strength for condition in response.steered]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    targets = [condition.figures.target for condition in response.steered]
    errors = [[item.value - item.low for item in targets], [item.high - item.value for item in targets]]
    left.errorbar(x, [item.value for item in targets], yerr=errors, marker="o", capsize=3, label="steer")
    spreads = [condition.spread for condition in response.random if condition.spread is not None]
    left.fill_between(x, [s.low for s in spreads], [s.top for s in spreads], alpha=0.3, color="grey", label="random")
    left.axhline(response.plain.figures.target.value, color="black", linestyle=":", label="plain")
    left.axhline(response.instruction.figures.target.value, color="tab:green", linestyle="--", label="prompt only")
    left.set(xlabel="strength", ylabel="P(target)", ylim=(0, 1), title=evaluation.artifact.card.name)
    left.legend(fontsize="small")
    _side_effects(right, x, evaluation)
    # Without the version of matplotlib in it, a repeated run gives the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _side_effects(axes: Any, x: Sequence[float | None], evaluation: SteerEvaluation) -> None:
    response = evaluation.response
    for conditions, label, style in ((response.steered, "steer", "-"), (response.random, "random", ":")):
        kl = [condition.figures.kl for condition in conditions]
        axes.plot(x, kl, color="tab:red", linestyle=style, marker=".", label=f"KL, {label}")
    axes.axhline(LIMITS.kl, color="tab:red", linewidth=0.6)
    axes.set(xlabel="strength", ylabel="KL, nats a token", title="side effects")
    other = axes.twinx()
    other.plot(
        x,
        [condition.figures.distinct_2 for condition in response.steered],
        color="tab:blue",
        marker=".",
        label="distinct-2, steer",
    )
    other.axhline(LIMITS.distinct_2 * response.plain.figures.distinct_2, color="tab:blue", linewidth=0.6)
    other.set(ylabel="distinct-2", ylim=(0, 1.05))
    lines = [*axes.get_lines()[:2], other.get_lines()[0]]
    axes.legend(lines, [line.get_label() for line in lines], fontsize="small", loc="center left")
