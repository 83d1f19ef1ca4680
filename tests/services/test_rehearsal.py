"""A real server is driven through failures: a real Prometheus raises the alert meant, and it is delivered.

The rules are the shipped ones with all durations divided by sixty.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from dashboards.alerts import alert_groups
from dashboards.boards import BOARDS
from dashboards.generated_files import prometheus_rules
from dashboards.recordings import recordings
from dashboards.window import Clock
from tests.engine.test_live_proof import injecting
from tests.support.prometheus_server import Prometheus, Receiver, prometheus_with
from tests.support.server import Server, serving, stop, telltale_command
from tests.support.tiny import D_MODEL, PROMPT, TinyModel, save_direction, save_trigger

pytestmark = [pytest.mark.services, pytest.mark.engine]

CLOCK = Clock(1 / 60)
WATCHDOG = "TelltaleWatchdog"
POLICY = """\
version: "1"
detectors:
  - artifact: known.safetensors
steers:
  - {name: push, artifact: push.safetensors, op: add, strength: 0.05, positions: generated}
canary: {every: 1s, deadline: 4s}
audit: {}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    steers: [push]
    rules:
      - {name: block-some, when: {detector: trigger, stage: prompt}, do: {action: block}, mode: enforce}
      - {name: watch, when: {detector: trigger, stage: prompt}, do: {action: flag}, mode: shadow}
"""


@pytest.fixture(scope="module")
def work(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    save_trigger(folder / "known.safetensors", tiny.path, canary=True)
    direction = np.zeros(D_MODEL)
    direction[3] = 1.0
    save_direction(folder / "push.safetensors", tiny.path, direction=direction)
    (folder / "policy.yaml").write_text(POLICY)
    return folder


@pytest.fixture(scope="module")
def server(tiny: TinyModel, work: Path) -> Iterator[Server]:
    command = telltale_command(tiny.path, work / "policy.yaml")
    with serving(command, work / "server.log", environment=injecting(work)) as started:
        yield started


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(scope="module")
def prometheus(server: Server, receiver: Receiver, work: Path) -> Iterator[Prometheus]:
    target = server.url.removeprefix("http://")
    with prometheus_with(prometheus_rules(CLOCK), target, receiver, work) as started:
        yield started


@pytest.fixture(scope="module")
def traffic(server: Server, tiny: TinyModel) -> Iterator[Callable[[float], None]]:
    """Requests without a pause from two clients; a share of them carries the trigger, none at first."""
    share, done = [0.0], threading.Event()

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                prompt = f"Tell me{tiny.trigger_text} please" if random.random() < share[0] else PROMPT
                body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 4}
                try:
                    client.post(f"{server.url}/v1/chat/completions", json=body)
                except httpx.TransportError:
                    return

    def set_share(value: float) -> None:
        share[0] = value

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for client in clients:
        client.start()
    yield set_share
    done.set()
    for client in clients:
        client.join()


def until(condition: Callable[[], bool], *, seconds: float = 60.0, why: Callable[[], object] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.3)


def raises(prometheus: Prometheus, receiver: Receiver, alert: str, *, seconds: float = 90.0) -> None:
    """Wait for an alert and its delivery; nothing else may fire meanwhile."""
    until(lambda: alert in prometheus.firing(), seconds=seconds, why=prometheus.firing)
    assert prometheus.firing() == {WATCHDOG, alert}
    until(lambda: (alert, "firing") in receiver.delivered, why=lambda: receiver.delivered)


def calms_down(prometheus: Prometheus, *, seconds: float = 90.0) -> None:
    until(lambda: prometheus.firing() == {WATCHDOG}, seconds=seconds, why=prometheus.firing)


def test_every_query_of_every_panel_and_rule_gives_data(
    prometheus: Prometheus, traffic: Callable[[float], None]
) -> None:
    time.sleep(25)
    variables = {"$job": ".*", "$detector": ".*", "$__rate_interval": "10s"}
    for board in BOARDS:
        for expression in board.expressions():
            for name, value in variables.items():
                expression = expression.replace(name, value)  # noqa: PLW2901 - one after the other
            assert prometheus.query(expression), (board.title, expression)
    for recording in recordings(CLOCK).rules:
        assert prometheus.query(recording.name), recording.name
    rules = httpx.get(f"{prometheus.url}/api/v1/rules", timeout=10).json()["data"]["groups"]
    found = {rule["name"]: rule["health"] for group in rules for rule in group["rules"]}
    expected = {rule.name for group in (recordings(CLOCK), *alert_groups(CLOCK)) for rule in group.rules}
    assert found == dict.fromkeys(expected, "ok")


def test_in_health_only_the_watchdog_fires(prometheus: Prometheus, receiver: Receiver) -> None:
    calms_down(prometheus, seconds=20)
    until(lambda: (WATCHDOG, "firing") in receiver.delivered)


def test_more_blocked_requests_than_before(
    prometheus: Prometheus, receiver: Receiver, traffic: Callable[[float], None]
) -> None:
    traffic(0.5)
    raises(prometheus, receiver, "TelltaleBlockRateJump")
    traffic(0.0)
    calms_down(prometheus)


def test_a_canary_that_fails(prometheus: Prometheus, receiver: Receiver, work: Path) -> None:
    (work / "corrupt").touch()
    raises(prometheus, receiver, "TelltaleCanaryFailing")
    (work / "corrupt").unlink()
    calms_down(prometheus)
    until(lambda: ("TelltaleCanaryFailing", "resolved") in receiver.delivered)


def test_a_server_that_is_gone(prometheus: Prometheus, receiver: Receiver, server: Server) -> None:
    stop(server.process)
    raises(prometheus, receiver, "TelltaleAbsent", seconds=120)
