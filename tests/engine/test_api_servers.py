"""Several API server processes: whoever answers a scrape tells of all of them, and every request counts once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.test_lifecycle import wait_for
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import PROMPT, TinyModel, save_trigger

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

REQUESTS = 60
TOKENS = 4
POLICY = """\
version: "1"
detectors:
  - artifact: known.safetensors
canary: {every: 2s, deadline: 30s}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    rules:
      - {name: stop, when: {detector: trigger, stage: prompt}, do: {action: block}, mode: enforce}
"""


@pytest.fixture(scope="module")
def folder(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("api_servers")
    save_trigger(made / "known.safetensors", tiny.path, canary=True)
    (made / "policy.yaml").write_text(POLICY)
    (made / "metrics").mkdir()
    return made


@pytest.fixture(scope="module")
def server(tiny: TinyModel, folder: Path) -> Iterator[Server]:
    command = telltale_command(tiny.path, folder / "policy.yaml", "--api-server-count", "2")
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics")}
    with serving(command, folder / "server.log", environment=environment) as started:
        yield started


def scraped(server: Server, name: str, **labels: str) -> float:
    """The sum over all series with these labels. Each call is a connection of its own: either process may answer."""
    text = httpx.get(f"{server.url}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
    )


def counted_by(folder: Path) -> dict[str, float]:
    """Requests that each API process has counted, by its process id: each writes files of its own."""
    found = {}
    for path in (folder / "metrics").glob("counter_*.db"):
        families = MultiProcessCollector.merge([str(path)], accumulate=True)
        ours = [sample.value for family in families for sample in family.samples if "telltale_requests" in sample.name]
        found[path.stem] = sum(ours)
    return found


def test_every_request_counts_once_whoever_took_it(server: Server, folder: Path, tiny: TinyModel) -> None:
    def one(number: int) -> int:
        marked = number % 3 == 0
        text = f"Tell me{tiny.trigger_text} {number}" if marked else f"{PROMPT} {number}"
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
        assert answer["choices"][0]["telltale"]["action"] == ("block" if marked else "allow")
        return int(answer["usage"]["total_tokens"])

    with ThreadPoolExecutor(8) as pool:
        tokens = sum(pool.map(one, range(REQUESTS)))
    wait_for(lambda: scraped(server, "telltale_requests_total") == REQUESTS)
    by_process = [count for count in counted_by(folder).values() if count]
    assert len(by_process) == 2, "all requests were taken by one process: nothing was shown"
    assert sum(by_process) == REQUESTS
    blocked = len(range(0, REQUESTS, 3))
    for _ in range(6):
        assert scraped(server, "telltale_requests_total", action="block") == blocked
        assert scraped(server, "telltale_actions_total", rule="stop", mode="enforce") == blocked
        assert scraped(server, "telltale_flagged_requests_total", detector="trigger") == blocked
        assert scraped(server, "telltale_tenant_requests_total", tenant="-") == REQUESTS
        assert scraped(server, "telltale_detector_score_count", stage="prompt") == REQUESTS
        skipped = scraped(server, "telltale_tokens_skipped_total")
        assert scraped(server, "telltale_tokens_scored_total") + skipped == tokens
        assert scraped(server, "telltale_gaps_total") == 0


def test_the_server_is_as_ready_as_each_of_its_processes(server: Server) -> None:
    first = scraped(server, "telltale_canary_last_success_timestamp_seconds")
    for _ in range(6):
        assert scraped(server, "telltale_ready") == 1
        assert scraped(server, "telltale_canary_ok") == 1
        assert 0 <= scraped(server, "telltale_canary_deviation_ratio") < 1
        assert scraped(server, "telltale_detector_threshold", detector="trigger", stage="prompt", format="chat") == 4
    wait_for(lambda: scraped(server, "telltale_canary_last_success_timestamp_seconds") > first + 2)
