"""What a server says that its monitor saw: the benchmark of a monitor that saw nothing is void. Reads /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from monitor import catalogue
from monitor.catalogue import Metric
from serving.bench import BenchError

_LATEST_SECONDS = 5.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Seen:
    """Counts since the start of a server.

    Attributes:
        requests: that ended.
        scored, skipped, gaps: token positions.
        acted: how often a rule fired.
    """

    requests: int
    scored: int
    skipped: int
    gaps: int
    acted: int

    def plus(self, other: Seen) -> Seen:
        """Both together."""
        return Seen(
            self.requests + other.requests,
            self.scored + other.scored,
            self.skipped + other.skipped,
            self.gaps + other.gaps,
            self.acted + other.acted,
        )

    def since(self, before: Seen) -> Seen:
        """What came in between."""
        return Seen(
            self.requests - before.requests,
            self.scored - before.scored,
            self.skipped - before.skipped,
            self.gaps - before.gaps,
            self.acted - before.acted,
        )


def read_seen(url: str) -> Seen | None:
    """The counts of a server; None if it is not monitored.

    Raises:
        httpx.HTTPError: it does not answer.
    """
    response = httpx.get(f"{url}/metrics", timeout=30.0, trust_env=False)
    response.raise_for_status()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value

    def total(metric: Metric) -> int:
        return int(totals.get(metric.name, 0.0))

    if catalogue.TOKENS_SCORED.name not in totals:
        return None
    return Seen(
        requests=total(catalogue.REQUESTS),
        scored=total(catalogue.TOKENS_SCORED),
        skipped=total(catalogue.TOKENS_SKIPPED),
        gaps=total(catalogue.GAPS),
        acted=total(catalogue.ACTIONS),
    )


def require_seen(url: str, before: Seen, *, requests: int, positions: int) -> Seen:
    """Check that every position of the requests since ``before`` was scored, or skipped for a named reason.

    Returns: the counts now.

    Raises:
        BenchError: positions are missing, there are gaps, nothing was scored, or a rule fired.
        httpx.HTTPError: the server does not answer.
    """
    deadline = time.monotonic() + _LATEST_SECONDS
    while True:
        now = read_seen(url)
        if now is None:
            raise BenchError("the server that should be monitored exports no telltale metrics. The benchmark is void.")
        new = now.since(before)
        if (new.requests >= requests and new.scored + new.skipped >= positions) or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    if (new.requests, new.scored + new.skipped, new.gaps, new.acted) != (requests, positions, 0, 0) or new.scored <= 0:
        raise BenchError(
            f"{requests} requests with {positions} positions were sent; the monitor counted {new.requests} requests, "
            f"{new.scored} positions scored and {new.skipped} skipped, {new.gaps} gaps, {new.acted} rules that fired. "
            "All positions must be counted, with no gap and no rule fired: the benchmark is void."
        )
    return now
