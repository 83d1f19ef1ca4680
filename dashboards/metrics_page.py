"""The reference of all metrics as a Markdown page, from the catalogue."""

from __future__ import annotations

from monitor.catalogue import CATALOGUE, Metric


def metrics_page(origin: str) -> str:
    """The page.

    Args:
        origin: how the page is made.
    """
    head = f"""# Metrics

{origin}

Labels are bounded by the policy file, never by requests. With several API server processes (`--api-server-count`)
counters and histograms are added up, and of `telltale_ready`, the canary's and drift's gauges the worst is told;
other gauges are those of the process that wrote last. vLLM's own metrics (`vllm:...`) stand beside these on the same
page.

| name | type | labels | what it counts |
| --- | --- | --- | --- |
"""
    return head + "".join(_row(metric) for metric in CATALOGUE)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.type.value} | {labels} | {metric.help} |\n"
