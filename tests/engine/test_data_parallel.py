"""Several engines behind one API: each has a monitor of its own, each is proved, and the metrics are of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.test_lifecycle import ended, wait_for
from tests.engine.test_live_proof import prepared
from tests.engine.test_serving import ask, detectors, metric
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

REQUESTS = 24


@pytest.fixture(scope="module")
def two_engines(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("two")
    command = telltale_command(tiny.path, prepared(folder, tiny), "--data-parallel-size", "2")
    with serving(command, folder / "server.log") as server:
        yield server


def successes(server: Server) -> dict[str, float]:
    """Requests that each engine has finished, by vLLM's own count."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if sample.name == "vllm:request_success_total":
                engine = sample.labels["engine"]
                found[engine] = found.get(engine, 0.0) + sample.value
    return found


@pytest.mark.covers("data parallel", "every position accounted for")
@pytest.mark.covers("data parallel", "account arrives")
@pytest.mark.covers("data parallel", "it really happens")
def test_every_engine_watches_its_own_requests(two_engines: Server, tiny: TinyModel) -> None:
    before, finished = ended(two_engines), successes(two_engines)

    def one(number: int) -> Any:
        text = tiny.trigger_text if number % 3 == 0 else ""
        return ask(two_engines, f"Question {number}{text} please", tokens=4 + number % 5)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(one, range(REQUESTS)))
    for number, reply in enumerate(replies):
        choice = reply.choices[0]
        assert choice.telltale["action"] == ("flag" if number % 3 == 0 else "allow")
        item = detectors(choice)["trigger", "prompt"]
        assert item["scored"] + sum(item["skipped"].values()) == reply.usage.total_tokens
        assert set(item["skipped"]) == {"sink", "final"}
    wait_for(lambda: ended(two_engines) == before + REQUESTS)
    now = successes(two_engines)
    assert all(now[engine] > finished.get(engine, 0.0) for engine in ("0", "1"))


@pytest.mark.covers("data parallel", "noticed")
def test_every_engine_is_proved_and_proves_itself_again(two_engines: Server) -> None:
    assert "engines=2" in two_engines.log.read_text()
    assert metric(two_engines, "telltale_canary_ok") == 1
    first = metric(two_engines, "telltale_canary_last_success_timestamp_seconds")
    wait_for(lambda: metric(two_engines, "telltale_canary_last_success_timestamp_seconds") > first + 2)
    for reason in ("unseen", "no_readouts", "not_finite", "monitor_error", "canary"):
        assert metric(two_engines, "telltale_gaps_total", reason=reason) == 0
