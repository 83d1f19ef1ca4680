"""Overview: does the monitor see, and what does it decide."""

from __future__ import annotations

from dashboards import recordings as recorded
from dashboards.panel import Board, Form, Panel, Row, Series, Unit
from monitor import catalogue

_JOB = '{job=~"$job"}'

OVERVIEW = Board(
    uid="telltale-overview",
    title="Telltale: overview",
    description="Does the monitor see, what does it decide, and is anything wrong?",
    rows=(
        Row(
            "Does it see?",
            (
                Panel(
                    "Servers that prove it",
                    (Series(f"sum({catalogue.READY.name}{_JOB})"),),
                    Unit.NUMBER,
                    "Servers whose proof at the start held and whose newest canary passed.",
                    Form.NUMBER,
                    width=4,
                    alarm_below=1,
                ),
                Panel(
                    "Tokens scored",
                    (Series(f"min({recorded.COVERAGE}{_JOB})"),),
                    Unit.SHARE,
                    "Of the tokens that have to be scored. Anything but 100 % is a gap.",
                    Form.NUMBER,
                    width=4,
                    alarm_below=1,
                ),
                Panel(
                    "Age of the canary",
                    (Series(f"time() - min({catalogue.CANARY_LAST_SUCCESS.name}{_JOB})"),),
                    Unit.SECONDS,
                    "Since a prompt with known scores last gave them on every engine of a server; the oldest.",
                    Form.NUMBER,
                    width=4,
                    alarm_above=300,
                ),
                Panel(
                    "Distance of the canary",
                    (Series(f"max({catalogue.CANARY_DEVIATION.name}{_JOB})"),),
                    Unit.SHARE,
                    "Of its scores from the cards', as a share of what is allowed.",
                    Form.NUMBER,
                    width=4,
                    alarm_above=1,
                ),
                Panel(
                    "Gaps by reason",
                    (
                        Series(
                            f"sum by (reason) (increase({catalogue.GAPS.name}{_JOB}[$__rate_interval]))", "{{reason}}"
                        ),
                    ),
                    Unit.NUMBER,
                    "Token positions that no detector has read. Their requests follow on_gap.",
                    width=8,
                ),
            ),
        ),
        Row(
            "What does it decide?",
            (
                Panel(
                    "Requests by action",
                    (Series(f"sum by (action) ({recorded.REQUESTS}{_JOB})", "{{action}}"),),
                    Unit.PER_SECOND,
                    "Requests that ended, by the most severe action that was enforced.",
                ),
                Panel(
                    "Share that is blocked",
                    (Series(f"{recorded.BLOCKED}{_JOB}", "{{job}}"),),
                    Unit.SHARE,
                    "Over a quarter of an hour.",
                ),
            ),
        ),
        Row(
            "What passes through it?",
            (
                Panel(
                    "Tokens scored and tokens generated",
                    (
                        Series(f"sum({recorded.SCORED}{_JOB})", "scored, prompts included"),
                        Series(f"sum(rate(vllm:generation_tokens_total{_JOB}[$__rate_interval]))", "generated"),
                    ),
                    Unit.NUMBER,
                    "A second. Scored tokens follow prompts and replies; cached prefixes count, as they are judged.",
                ),
                Panel(
                    "Noticed in prompts",
                    (
                        Series(
                            f"sum by (event) (increase({catalogue.PROMPT_EVENTS.name}{_JOB}[$__rate_interval]))",
                            "{{event}}",
                        ),
                        Series(f"sum(increase({catalogue.UNSIGNED.name}{_JOB}[$__rate_interval]))", "unsigned"),
                    ),
                    Unit.NUMBER,
                    "Special tokens inside content, roles that nobody could tell, requests around the front end.",
                ),
                Panel(
                    "Turned away",
                    (
                        Series(
                            f"sum by (reason) (increase({catalogue.TURNED_AWAY.name}{_JOB}[$__rate_interval]))",
                            "{{reason}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Requests without a key or with another scope, too many of them, or too large.",
                ),
            ),
        ),
    ),
)
