"""Conversations: what stands against sessions, and whether they are remembered at all."""

from __future__ import annotations

from dashboards.panel import Board, Panel, Row, Series, Unit
from monitor import catalogue

_JOB = '{job=~"$job"}'


def _rate(metric: catalogue.Metric, by: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric.name}{_JOB}[$__rate_interval]))"


CONVERSATIONS = Board(
    uid="telltale-conversations",
    title="Telltale: conversations",
    description="Rules over several requests: how often they fire, and on how much of the traffic they can.",
    rows=(
        Row(
            "Rules",
            (
                Panel(
                    "Rules that fire",
                    (
                        Series(
                            _rate(catalogue.SESSION_RULES_FIRED, "rule, action, mode"), "{{rule}}: {{action}} {{mode}}"
                        ),
                    ),
                    Unit.PER_SECOND,
                    "Once per session, until they stand no more. What they then do to requests is under Rules.",
                ),
                Panel(
                    "Requests that name no session",
                    (
                        Series(
                            f'sum(rate({catalogue.SESSION_REQUESTS.name}{{job=~"$job", named="no"}}[$__rate_interval]))'
                            f" / {_rate(catalogue.SESSION_REQUESTS)}",
                            "share",
                        ),
                    ),
                    Unit.SHARE,
                    "Rules by session do not see them.",
                ),
            ),
        ),
        Row(
            "Tenants",
            (
                Panel(
                    "Requests near a threshold, too often",
                    (
                        Series(
                            f"sum by (detector, policy) (increase({catalogue.PROBING.name}{_JOB}[$__rate_interval]))",
                            "{{detector}} ({{policy}})",
                        ),
                    ),
                    Unit.NUMBER,
                    "Somebody may be looking for a prompt that just passes. The event says which tenant.",
                ),
            ),
        ),
        Row(
            "Memory",
            (
                Panel(
                    "Sessions in memory",
                    (Series(f"sum({catalogue.SESSIONS.name}{_JOB})", "sessions"),),
                    Unit.NUMBER,
                    "Of all processes; a database counts its own.",
                ),
                Panel(
                    "Forgotten, or not to be had",
                    (
                        Series(_rate(catalogue.SESSIONS_FORGOTTEN), "forgotten for want of room"),
                        Series(_rate(catalogue.SESSION_STORE_ERRORS, "operation"), "database failed: {{operation}}"),
                    ),
                    Unit.PER_SECOND,
                    "Many that are forgotten: somebody opens many sessions, or the bound is too small.",
                ),
            ),
        ),
    ),
)
