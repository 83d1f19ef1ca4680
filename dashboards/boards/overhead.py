"""Overhead: what monitoring costs, beside what the engine does."""

from __future__ import annotations

from dashboards import recordings as recorded
from dashboards.panel import Board, Panel, Row, Series, Unit
from dashboards.sink_row import SINKS
from monitor import catalogue

_JOB = '{job=~"$job"}'


def _steps(quantile: float) -> Series:
    buckets = f"rate({catalogue.OBSERVE_SECONDS.name}_bucket{_JOB}[$__rate_interval])"
    return Series(f"histogram_quantile({quantile}, sum by (le) ({buckets}))", f"{quantile:.0%} of the steps")


OVERHEAD = Board(
    uid="telltale-overhead",
    title="Telltale: overhead",
    description="How long an engine's step waits for the monitor, and what the engine does meanwhile.",
    rows=(
        Row(
            "The monitor",
            (
                Panel(
                    "One step of the engine waits",
                    (_steps(0.5), _steps(0.95), Series(f"max({recorded.OBSERVE_P99}{_JOB})", "99% over 5 minutes")),
                    Unit.SECONDS,
                    "Scores, aggregates and decisions of all requests of a step. The alert's budget is 5 ms.",
                ),
                Panel(
                    "Share of the time",
                    (
                        Series(
                            f"sum by (job) (rate({catalogue.OBSERVE_SECONDS.name}_sum{_JOB}[$__rate_interval]))",
                            "{{job}}",
                        ),
                    ),
                    Unit.SHARE,
                    "That the engine's process spends in the monitor.",
                ),
                Panel(
                    "By phase",
                    (
                        Series(
                            "histogram_quantile(0.95, sum by (phase, le) "
                            f"(rate({catalogue.OVERHEAD_SECONDS.name}_bucket{_JOB}[$__rate_interval])))",
                            "{{phase}}",
                        ),
                    ),
                    Unit.SECONDS,
                    "95% of the steps. What taps cost inside a compiled pass or on a GPU, `telltale bench` measures.",
                ),
                Panel(
                    "Held back",
                    (Series(f"sum({catalogue.HELD_BACK.name}{_JOB})", "outputs"),),
                    Unit.NUMBER,
                    "Outputs that wait until what follows them is scored.",
                ),
                Panel(
                    "A round of canaries",
                    (Series(f"max by (instance) ({catalogue.CANARY_SECONDS.name}{_JOB})", "{{instance}}"),),
                    Unit.SECONDS,
                    "Waiting in the queue included.",
                ),
            ),
        ),
        Row(
            "The audit trail",
            (
                Panel(
                    "Events stored",
                    (
                        Series(
                            f"sum by (kind) (rate({catalogue.AUDIT_EVENTS.name}{_JOB}[$__rate_interval]))", "{{kind}}"
                        ),
                    ),
                    Unit.NUMBER,
                    "A second.",
                ),
                Panel(
                    "An event is stored after",
                    (
                        Series(
                            "histogram_quantile(0.99, sum by (le) "
                            f"(rate({catalogue.AUDIT_SECONDS.name}_bucket{_JOB}[$__rate_interval])))",
                            "99% of the events",
                        ),
                    ),
                    Unit.SECONDS,
                    "With before_release, a response waits so long for its end.",
                ),
                Panel(
                    "Not stored",
                    (
                        Series(f"sum({catalogue.AUDIT_QUEUE.name}{_JOB})", "waiting"),
                        Series(f"sum(increase({catalogue.AUDIT_DROPPED.name}{_JOB}[$__rate_interval]))", "dropped"),
                        Series(
                            f"sum(increase({catalogue.AUDIT_WITHHELD.name}{_JOB}[$__rate_interval]))",
                            "responses withheld",
                        ),
                    ),
                    Unit.NUMBER,
                    "Events, and responses that were withheld for them.",
                ),
            ),
        ),
        SINKS,
        Row(
            "The engine",
            (
                Panel(
                    "Requests",
                    (
                        Series(f"sum(vllm:num_requests_running{_JOB})", "running"),
                        Series(f"sum(vllm:num_requests_waiting{_JOB})", "waiting"),
                    ),
                    Unit.NUMBER,
                    "As vLLM counts them.",
                ),
                Panel(
                    "Time to the first token",
                    (
                        Series(
                            "histogram_quantile(0.95, sum by (le) "
                            f"(rate(vllm:time_to_first_token_seconds_bucket{_JOB}[$__rate_interval])))",
                            "95% of the requests",
                        ),
                    ),
                    Unit.SECONDS,
                    "As vLLM measures it.",
                ),
            ),
        ),
    ),
)
