"""``telltale top``: what a running server sees, as tables that follow it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from monitor import catalogue
from monitor.types import Mode
from serving.scrape import Scrape, scrape

_NONE = "-"
_OF_A_CHECK = ("detector", "stage", "aggregate", "segments")


def top(*, url: str, key_env: str, every: float, once: bool) -> None:
    """Show a server's metrics until it is interrupted, or once.

    Args:
        url: of the server.
        key_env: environment variable with an API key; it need not be set.
        every: seconds from one reading to the next.
        once: print one table, of all since the start, and return.
    Raises:
        serving.scrape.ScrapeError: the server does not answer or is none of ours.
    """
    key = os.environ.get(key_env)
    now = scrape(url, key)
    console = Console()
    if once:
        console.print(render(now, None))
        return
    with Live(render(now, None), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            before, now = now, scrape(url, key)
            live.update(render(now, before), refresh=True)


def render(now: Scrape, before: Scrape | None) -> Group:
    """The tables of one moment.

    Args:
        now: the newest reading.
        before: the one before it, for rates; None: rates are those since the server's start, and nothing is said a
            second.
    """
    parts: list[Text | Table] = [Text(line) for line in _state(now, before)]
    return Group(*parts, _detectors(now, before), _rules(now), *_outlets(now))


def _state(now: Scrape, before: Scrape | None) -> Iterator[str]:
    ready = "ready" if now.value(catalogue.READY) else "NOT READY"
    passed = now.value(catalogue.CANARY_LAST_SUCCESS)
    age = f"{max(0.0, time.time() - passed):.0f} s ago" if passed else "never"
    canary = "passes" if now.value(catalogue.CANARY_OK) else "FAILS"
    yield f"{ready}; canary {canary}, last passed {age}"
    scored, gaps = (now.total(metric.name) for metric in (catalogue.TOKENS_SCORED, catalogue.GAPS))
    coverage = f"{scored / (scored + gaps):.4%}" if scored + gaps else _NONE
    yield f"coverage {coverage}: {scored:.0f} tokens scored, {gaps:.0f} in gaps"
    requests = f"{now.total(catalogue.REQUESTS.name):.0f} requests"
    if before is not None:
        rates = ((catalogue.REQUESTS, "requests"), (catalogue.TOKENS_SCORED, "tokens"))
        requests += "".join(f", {_per_second(now, before, metric.name):.1f} {what}/s" for metric, what in rates)
    actions = {has["action"]: 0.0 for has, _ in now.each(catalogue.REQUESTS.name)}
    for has, value in now.each(catalogue.REQUESTS.name):
        actions[has["action"]] += value
    said = ", ".join(f"{action} {value:.0f}" for action, value in actions.items() if value)
    yield f"{requests}{f' ({said})' if said else ''}"


def _detectors(now: Scrape, before: Scrape | None) -> Table:
    """Each statistic: how often it was taken, how often it lay above its threshold."""
    table = _table(
        "detectors", ("detector", "stage", "statistic", "reads"), ("requests", "fired", "rate", "lowest threshold")
    )
    fired, score = catalogue.DETECTOR_FIRED.name, catalogue.DETECTOR_SCORE.name
    for has, value in sorted(now.each(fired), key=lambda one: [one[0][label] for label in _OF_A_CHECK]):
        of = {label: has[label] for label in _OF_A_CHECK}
        taken = now.total(f"{score}_count", **of)
        limits = now.each(catalogue.DETECTOR_THRESHOLD.name, detector=of["detector"], stage=of["stage"])
        lowest = min((limit for _, limit in limits), default=None)
        part, whole = value, taken
        if before is not None:
            part, whole = value - before.total(fired, **of), taken - before.total(f"{score}_count", **of)
        table.add_row(
            *(of["detector"], of["stage"], of["aggregate"], of["segments"] or "all"),
            f"{taken:.0f}",
            f"{value:.0f}",
            f"{part / whole:.2%}" if whole > 0 else _NONE,
            f"{lowest:.4g}" if lowest is not None else _NONE,
        )
    return table


def _rules(now: Scrape) -> Table:
    table = _table("rules", ("rule", "does", "mode", "policy"), ("requests", "of all"))
    for has, value in now.each(catalogue.ACTIONS.name):
        requests = now.total(catalogue.REQUESTS.name, policy=has["policy"])
        does = has["action"] if has["mode"] == Mode.ENFORCE else f"would {has['action']}"
        share = f"{value / requests:.2%}" if requests else _NONE
        table.add_row(has["rule"], does, has["mode"], has["policy"], f"{value:.0f}", share)
    return table


def _outlets(now: Scrape) -> Iterator[Table]:
    """The audit trail and the sinks, where there are any."""
    table = _table("events", ("to",), ("stored or delivered", "waiting", "failed", "lost"))
    audit, sinks = list(now.each(catalogue.AUDIT_EVENTS.name)), list(now.each(catalogue.SINK_DELIVERED.name))
    if audit:
        names = (catalogue.AUDIT_QUEUE.name, catalogue.AUDIT_ERRORS.name, catalogue.AUDIT_DROPPED.name)
        table.add_row("audit trail", f"{sum(value for _, value in audit):.0f}", *(f"{now.total(n):.0f}" for n in names))
    for has, value in sinks:
        sink = has["sink"]
        lost = now.total(catalogue.SINK_DROPPED.name, sink=sink) + now.total(
            catalogue.SINK_DEAD_LETTERS.name, sink=sink
        )
        waiting, failed = (now.total(m.name, sink=sink) for m in (catalogue.SINK_QUEUE, catalogue.SINK_FAILED))
        table.add_row(sink, f"{value:.0f}", f"{waiting:.0f}", f"{failed:.0f}", f"{lost:.0f}")
    if audit or sinks:
        yield table


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _per_second(now: Scrape, before: Scrape, name: str) -> float:
    passed = now.at - before.at
    # A server that was started anew counts from zero again.
    return max(0.0, now.total(name) - before.total(name)) / passed if passed > 0 else 0.0
