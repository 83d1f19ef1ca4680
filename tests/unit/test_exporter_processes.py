"""Several API processes under one page of metrics: counts add up, and the worst of them is what the gauges say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

ROOT = Path(__file__).parents[2]
PROCESS = """
import sys
from pathlib import Path
from prometheus_client import CollectorRegistry
from monitor.canary import CanaryFailure
from tests.unit.test_exporter import RULES, Run, calibrated
from tests.unit.artifacts import make_card, plan_of, policy_text, unit_artifact

folder, count, passes = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "passes"
plan = plan_of(folder, policy_text(RULES), {"harm": unit_artifact(make_card(calibrations=[calibrated()]))})
run = Run(plan, columns=1)
run.exporter.canary_passed(0.5, 0.1 * count)
if not passes:
    run.exporter.canary_failed(CanaryFailure.WRONG_SCORES)
for number in range(count):
    run.request(str(number), [0, 0.5, 5.0 * (number == 0)], [])
"""


def test_counts_add_up_and_gauges_tell_the_worst(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(metrics), "PYTHONPATH": str(ROOT)}
    for number, (count, state) in enumerate(((3, "passes"), (4, "fails"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", PROCESS, str(folder), str(count), state]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(metrics))
    samples = [sample for family in registry.collect() for sample in family.samples]

    def total(name: str, **labels: str) -> float:
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    assert total("telltale_requests_total") == 7
    assert total("telltale_flagged_requests_total", detector="harm") == 2
    where = {"detector": "harm", "stage": "prompt", "aggregate": "max"}
    assert total("telltale_detector_score_count", **where) == 7
    assert total("telltale_detector_score_bucket", **where, le="+Inf") == 7
    assert total("telltale_detector_score_bucket", **where, le="1.5") == 5
    assert total("telltale_ready") == total("telltale_canary_ok") == 0
    assert total("telltale_canary_deviation_ratio") == 0.4
    assert total("telltale_canary_failures_total") == 1
    pages = [(s.name, tuple(sorted(s.labels.items()))) for s in samples]
    assert len(pages) == len(set(pages))
