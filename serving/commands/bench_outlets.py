"""``telltale bench --audit``."""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from serving.arguments import parse_serve, vllm_arguments
from serving.bench.detectors import LAYERS
from serving.bench.load import Steady, Workload
from serving.bench.machine import read_machine
from serving.bench.outlets import SCRAPE_SECONDS, measure_outlets
from serving.bench.outlets_report import OutletsReport
from serving.bench.servers import ended_by_signals
from serving.bench.session import Subject
from serving.builtin import DEFAULT_MODEL, ensure_builtin_model
from serving.commands.model import say

WORKLOAD = Workload(steady=Steady(concurrent=8, prompt_tokens=64, output_tokens=64, single=8))
"""Shorter requests than those of ``telltale bench``: what an event costs comes once a request."""


def bench_outlets(
    *, rounds: int, out: Path, scrape_seconds: float = SCRAPE_SECONDS, workload: Workload = WORKLOAD
) -> None:
    """Measure a server that writes down and tells everything against one that does not, and write the report.

    Args:
        rounds: that count.
        out: folder for the report.
        scrape_seconds: between two scrapes.
        workload: of one turn.
    Raises:
        probes.errors.TelltaleError: a server failed, the monitor did not see everything, or an event is missing.
    """
    machine, started, start = read_machine(), datetime.now(UTC), time.monotonic()
    if machine.load > machine.cores / 4:
        say(f"the load of this machine is {machine.load}: figures taken now are disturbed by what else runs")
    folder = ensure_builtin_model(DEFAULT_MODEL, progress=say).path
    arguments = vllm_arguments(parse_serve(None, (), policy_model=DEFAULT_MODEL), folder)
    subject = Subject(DEFAULT_MODEL, DEFAULT_MODEL, folder, tuple(arguments[1:]), LAYERS)
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="telltale-bench-") as work:
        pairs, told = measure_outlets(
            subject, Path(work), workload, rounds=rounds, progress=say, scrape_seconds=scrape_seconds
        )
    seldom = f" --scrape-seconds {scrape_seconds:g}" if scrape_seconds != SCRAPE_SECONDS else ""
    report = OutletsReport(
        machine=machine,
        command=f"telltale bench --audit --rounds {rounds}{seldom}",
        started=started,
        seconds=time.monotonic() - start,
        model=DEFAULT_MODEL,
        flags=subject.flags,
        workload=workload,
        pairs=pairs,
        told=told,
        scrape_seconds=scrape_seconds,
    )
    paths = report.write(out)
    sys.stdout.write(report.markdown())
    say(f"wrote {' and '.join(str(path) for path in paths)}")
