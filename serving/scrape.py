"""What a server's ``/metrics`` says at one moment, as numbers to be asked for. Knows no server of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from monitor.catalogue import READY, Metric
from probes.errors import TelltaleError

Labels = Mapping[str, str]
_TIMEOUT_SECONDS = 5.0


class ScrapeError(TelltaleError, OSError):
    """A server's metrics cannot be read."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading.

    Attributes:
        samples: name as scraped (with _total, _bucket ...), labels, value.
        at: when, by a monotonic clock, in seconds.
    """

    samples: tuple[tuple[str, Labels, float], ...]
    at: float = field(default_factory=time.monotonic)

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of this name that have these labels; 0 if there are none."""
        return sum(value for _, value in self.each(name, **labels))

    def each(self, name: str, **labels: str) -> Iterator[tuple[Labels, float]]:
        """The series of this name that have these labels."""
        for found, has, value in self.samples:
            if found == name and all(has.get(label) == wanted for label, wanted in labels.items()):
                yield has, value

    def value(self, metric: Metric) -> float | None:
        """A gauge without labels; None if it is not there."""
        return next((value for _, value in self.each(metric.name)), None)


def parse_scrape(text: str) -> Scrape:
    """Read Prometheus's text format."""
    families = text_string_to_metric_families(text)
    return Scrape(tuple((one.name, one.labels, one.value) for family in families for one in family.samples))


def scrape(url: str, key: str | None) -> Scrape:
    """Read a server's metrics.

    Args:
        url: of the server, without a path.
        key: API key, if it asks for one.
    Raises:
        ScrapeError: it does not answer, refuses, or is not monitored by telltale.
    """
    address = f"{url.rstrip('/')}/metrics"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx2.get(address, headers=headers, timeout=_TIMEOUT_SECONDS)
    except (httpx2.TransportError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ScrapeError(f"{address}: does not answer ({error}). Is the server there? Give another --url.") from error
    if response.status_code in {401, 403}:
        raise ScrapeError(f"{address}: asks for a key. Set TELLTALE_API_KEY, or name another variable with --key-env.")
    if not response.is_success:
        raise ScrapeError(f"{address}: answers {response.status_code}. Give the --url of a telltale server.")
    found = parse_scrape(response.text)
    if found.value(READY) is None:
        raise ScrapeError(f"{address}: has no metrics of telltale. Give the --url of a telltale server.")
    return found
