"""A real server is driven through failures: a real Prometheus raises the alert meant, and it is delivered.

The rules are the shipped ones with all durations divided by sixty.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from dashboards.alerts import alert_groups
from dashboards.boards import BOARDS
from dashboards.generated_files import prometheus_rules
from dashboards.recordings import recordings
from dashboards.window import Clock
from monitor import catalogue
from monitor.tenant_metrics import NOBODY
from serving.cli import app
from tests.engine.test_live_proof import injecting
from tests.support.prometheus_server import Prometheus, Receiver, prometheus_with
from tests.support.rehearsed import LATENT, save_rehearsed
from tests.support.server import Server, serving, stop, telltale_command
from tests.support.sink_receiver import Receiver as SinkReceiver
from tests.support.sink_receiver import receiving
from tests.support.tiny import PROMPT, TinyModel

pytestmark = [pytest.mark.services, pytest.mark.engine]

CLOCK = Clock(1 / 60)
WATCHDOG = "TelltaleWatchdog"
SECRET = "TELLTALE_REHEARSAL_SECRET"  # noqa: S105 - the name of a variable
POLICY = f"""\
version: "1"
detectors:
  - artifact: known.safetensors
  - artifact: steady.safetensors
  - artifact: odd.safetensors
  - {{artifact: replies.safetensors, alert: {{severity: warning, count: 3, within: 20s, for: 1s, notify: oncall}}}}
  - name: mark
    kind: sae_latent
    sae: planted.safetensors
    latents: [{LATENT}]
    alert: {{severity: info, count: 3, within: 20s}}
steers:
  - {{name: push, artifact: push.safetensors, op: add, strength: 0.05, positions: generated}}
canary: {{every: 1s, deadline: 4s}}
audit: {{}}
sinks:
  - {{name: oncall, kind: webhook, url: "RECEIVER", secret_env: {SECRET}, events: [decision], min_action: block}}
explain: {{sae: planted.safetensors, tokens: 1, top: 2, per_minute: 20}}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    steers: [push]
    probing: {{}}
    rules:
      - name: block-some
        when: {{detector: trigger, stage: prompt, segments: [user]}}
        do: {{action: block}}
        mode: enforce
      - name: watch
        when: {{detector: trigger, stage: prompt, segments: [user]}}
        do: {{action: flag}}
        mode: shadow
      - name: system-mark
        when: {{detector: trigger, stage: prompt, segments: [system], above: {{value: 4}}}}
        do: {{action: flag}}
        mode: shadow
        alert: {{severity: critical, count: 3, within: 20s}}
      - name: reply-mark
        when: {{detector: replies, stage: stream, above: {{value: 4}}}}
        do: {{action: flag}}
        mode: shadow
      - name: calmer
        when: {{detector: trigger, stage: prompt, segments: [system], above: {{value: 4}}}}
        do: {{action: regenerate, system: "Be brief.", otherwise: block}}
        mode: shadow
      - name: again-and-again
        when:
          detector: trigger
          stage: conversation
          of: prompt
          segments: [system]
          accumulate: {{kind: m_of_n, count: 5, window: 20}}
          above: {{value: 4}}
        do: {{action: flag}}
        mode: shadow
      - name: history-mark
        when: {{detector: mark, stage: prompt, segments: [assistant], above: {{value: 4}}}}
        do: {{action: flag}}
        mode: shadow
"""


@pytest.fixture(scope="module")
def oncall() -> Iterator[SinkReceiver]:
    """Who is told by the server itself, around Prometheus."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def work(tiny: TinyModel, oncall: SinkReceiver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    save_rehearsed(folder, tiny)
    (folder / "policy.yaml").write_text(POLICY.replace("RECEIVER", oncall.url))
    return folder


@pytest.fixture(scope="module")
def server(tiny: TinyModel, work: Path) -> Iterator[Server]:
    command = telltale_command(tiny.path, work / "policy.yaml")
    secret = f"whsec_{base64.b64encode(bytes(range(32))).decode()}"
    with serving(command, work / "server.log", environment={**injecting(work), SECRET: secret}) as started:
        yield started


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(scope="module")
def prometheus(server: Server, receiver: Receiver, work: Path) -> Iterator[Prometheus]:
    target = server.url.removeprefix("http://")
    rules = CliRunner().invoke(app, ["alerts", "render", str(work / "policy.yaml")])
    assert rules.exit_code == 0, rules.output
    with prometheus_with([prometheus_rules(CLOCK), rules.stdout], target, receiver, work) as started:
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


Ask = Callable[..., None]


@pytest.fixture
def ask(server: Server) -> Ask:
    """Send a chat of these messages some times."""

    def send(*messages: tuple[str, str], times: int = 8, **settings: object) -> None:
        body = {"model": "tiny", "max_tokens": 4, **settings}
        body["messages"] = [{"role": role, "content": text} for role, text in messages]
        for _ in range(times):
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == httpx.codes.OK, answer.text

    return send


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
    """Wait until nothing fires, and nothing is about to."""
    pending = 'ALERTS{alertstate="pending"}'
    until(
        lambda: prometheus.firing() == {WATCHDOG} and not prometheus.query(pending),
        seconds=seconds,
        why=lambda: (prometheus.firing(), prometheus.query(pending)),
    )


def test_every_query_of_every_panel_and_rule_gives_data(
    prometheus: Prometheus, traffic: Callable[[float], None], ask: Ask, tiny: TinyModel
) -> None:
    # One reply with a mark in it, so that there is a delay to be shown; drift is told from 200 requests on.
    ask(("user", PROMPT), times=1, max_tokens=3, logit_bias={str(tiny.trigger): 100})
    until(lambda: bool(prometheus.query(catalogue.SCORE_PSI.name)), seconds=120)
    time.sleep(10)
    variables = {"$job": ".*", "$detector": ".*", "$tenant": NOBODY, "$__rate_interval": "10s"}
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
    expected |= {"TelltaleRuleFlagged", "TelltaleDetectorFlagged", "TelltaleLatentsFlagged"}
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


def flagged(prometheus: Prometheus, receiver: Receiver, alert: str) -> dict[str, str]:
    """Wait for an alert of the policy file, and that it ends; its labels."""
    raises(prometheus, receiver, alert)
    found = prometheus.query(f'ALERTS{{alertname="{alert}", alertstate="firing"}}')
    assert len(found) == 1
    calms_down(prometheus)
    return {name: value for name, value in found[0]["metric"].items() if name in FLAG_LABELS}


FLAG_LABELS = ("severity", "rule", "policy", "detector")


def test_a_rule_with_an_alert(prometheus: Prometheus, receiver: Receiver, ask: Ask, tiny: TinyModel) -> None:
    ask(("system", f"Be{tiny.trigger_text} brief"), ("user", PROMPT))
    found = flagged(prometheus, receiver, "TelltaleRuleFlagged")
    assert found == {"severity": "critical", "rule": "system-mark", "policy": "default"}


def test_a_detector_with_an_alert(
    prometheus: Prometheus, receiver: Receiver, oncall: SinkReceiver, ask: Ask, tiny: TinyModel
) -> None:
    before = len(oncall.got)
    ask(("user", PROMPT), logit_bias={str(tiny.trigger): 100}, times=8)
    oncall.wait_for(before + 8)  # its alert names the sink: each flagged request goes there, in shadow too
    assert flagged(prometheus, receiver, "TelltaleDetectorFlagged") == {"severity": "warning", "detector": "replies"}


def test_a_latent_with_an_alert(prometheus: Prometheus, receiver: Receiver, ask: Ask, tiny: TinyModel) -> None:
    ask(("user", PROMPT), ("assistant", f"Once{tiny.trigger_text} upon"), ("user", PROMPT))
    assert flagged(prometheus, receiver, "TelltaleLatentsFlagged") == {"severity": "info", "detector": "mark"}


def test_a_canary_that_fails(prometheus: Prometheus, receiver: Receiver, work: Path) -> None:
    (work / "corrupt").touch()
    raises(prometheus, receiver, "TelltaleCanaryFailing")
    (work / "corrupt").unlink()
    calms_down(prometheus)
    until(lambda: ("TelltaleCanaryFailing", "resolved") in receiver.delivered)


def test_a_server_that_is_gone(prometheus: Prometheus, receiver: Receiver, server: Server) -> None:
    stop(server.process)
    raises(prometheus, receiver, "TelltaleAbsent", seconds=120)
