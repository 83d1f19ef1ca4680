"""A running server goes on proving that it sees: it is not ready while it does not, and ends when its engine does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from probes.artifact import card_path_of
from tests.engine.conftest import client_of
from tests.engine.test_serving import metric
from tests.engine.test_wrong_things import refused
from tests.support.server import SMALL, Refusal, Server, refusing, serving, telltale_command
from tests.support.tiny import PROMPT, TinyModel, save_trigger

pytestmark = pytest.mark.engine

POLICY = """\
version: "1"
detectors:
  - artifact: known.safetensors
canary: {every: 1s, deadline: 5s}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    text: "Not now."
    rules:
      - {name: watch-prompt, when: {detector: trigger, stage: prompt}, do: {action: flag}, mode: enforce}
"""
INJECTED = Path(__file__).parent / "injected"
END_SECONDS = 60.0


def prepared(folder: Path, tiny: TinyModel) -> Path:
    save_trigger(folder / "known.safetensors", tiny.path, canary=True)
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    return policy


def injecting(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(INJECTED), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "TELLTALE_TEST_FAULTS": str(folder)}


@pytest.fixture(scope="module")
def work(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    prepared(folder, tiny)
    return folder


@pytest.fixture(scope="module")
def mistaken(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refusal]:
    """The start of a server whose card expects other scores than the model gives."""
    folder = tmp_path_factory.mktemp("mistaken")
    policy = prepared(folder, tiny)
    path = card_path_of(folder / "known.safetensors")
    card = json.loads(path.read_text())
    card["canary"]["scores"][4] += 3 * card["canary"]["tolerance"]
    path.write_text(json.dumps(card))
    with refusing(telltale_command(tiny.path, policy), folder / "stderr.txt") as started:
        yield started


@pytest.fixture(scope="module")
def server(tiny: TinyModel, work: Path, mistaken: Refusal) -> Iterator[Server]:
    # Both start at once: a start is mostly imports, on one core.
    command = telltale_command(tiny.path, work / "policy.yaml")
    with serving(command, work / "server.log", environment=injecting(work)) as started:
        yield started


def ready(server: Server) -> tuple[int, str]:
    answer = httpx.get(f"{server.url}/ready", timeout=10)
    return answer.status_code, answer.json()["status"]


def until(condition: object, *, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.1)


def ask(server: Server) -> tuple[str | None, str | None]:
    reply = client_of(server).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], max_tokens=4, temperature=0
    )
    return reply.choices[0].finish_reason, reply.choices[0].message.content


@pytest.mark.covers("canary requests", "isolation")
def test_rounds_go_on_and_are_nobodys_requests(server: Server) -> None:
    first = metric(server, "telltale_canary_last_success_timestamp_seconds")
    scored = metric(server, "telltale_tokens_scored_total")
    until(lambda: metric(server, "telltale_canary_last_success_timestamp_seconds") > first + 1)
    assert ready(server) == (200, "ready")
    assert metric(server, "telltale_canary_ok") == 1
    assert 0 < metric(server, "telltale_canary_seconds") < 5
    assert metric(server, "telltale_tokens_scored_total") == scored
    for action in ("allow", "flag", "block"):
        assert metric(server, "telltale_requests_total", action=action) == 0


@pytest.mark.covers("canary: corrupted weights", "gap counted, on_gap followed")
@pytest.mark.covers("canary: corrupted weights", "not ready meanwhile")
def test_a_bank_that_is_corrupted_while_it_serves_stops_requests_until_it_is_whole_again(
    server: Server, work: Path
) -> None:
    assert ask(server)[0] == "length"
    (work / "corrupt").touch()
    until(lambda: ready(server)[0] == 503)
    assert ready(server)[1] == "canary fails: wrong_scores"
    assert ask(server) == ("content_filter", "Not now.")
    assert metric(server, "telltale_canary_ok") == 0
    assert metric(server, "telltale_ready") == 0
    assert metric(server, "telltale_canary_failures_total", reason="wrong_scores") >= 1
    assert metric(server, "telltale_gaps_total", reason="canary") > 0
    assert metric(server, "telltale_actions_total", rule="on_gap", action="block", mode="enforce") == 1
    log = server.log.read_text()
    assert "detector 'trigger' at position" in log
    (work / "corrupt").unlink()
    until(lambda: ready(server) == (200, "ready"))
    assert ask(server)[0] == "length"
    assert metric(server, "telltale_canary_ok") == 1


def process_of(server: Server, title: str) -> int:
    children = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [child.pid for child in children if title in " ".join(child.cmdline())]
    return found


@pytest.mark.covers("engine that hangs", "not ready meanwhile")
def test_an_engine_that_hangs_is_not_ready_until_it_answers_again(server: Server) -> None:
    engine = process_of(server, "EngineCore")
    os.kill(engine, signal.SIGSTOP)
    try:
        until(lambda: ready(server)[0] == 503)
        assert ready(server)[1] == "canary fails: no_answer"
    finally:
        os.kill(engine, signal.SIGCONT)
    until(lambda: ready(server) == (200, "ready"))
    assert metric(server, "telltale_canary_failures_total", reason="no_answer") >= 1
    assert ask(server)[0] == "length"


def test_who_asks_while_others_are_answered_does_not_wait_until_they_are(server: Server) -> None:
    def read(_: int) -> tuple[float, float]:
        """When the first line of a long reply came, and the last."""
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=90) as answer:
            times = [time.monotonic() for line in answer.iter_lines() if line]
        assert len(times) == 901
        return times[0], times[-1]

    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            first, last = zip(*pool.map(read, range(8)), strict=True)
        assert max(first) < min(last)


@dataclass
class Client:
    """Sends request after request until one does not end well, and keeps how that one ended."""

    server: Server
    stream: bool
    began: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    lines: list[str] = field(default_factory=list)
    refused: bool = False

    def run(self) -> None:
        while self._ends_well():
            pass

    def _ends_well(self) -> bool:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": self.stream}
        self.lines = []
        try:
            with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=90) as answer:
                self.status = answer.status_code
                for line in answer.iter_lines():
                    self.lines.append(line)
                    self.began.set()
        except httpx.ConnectError:
            self.refused = True
            return False
        except httpx.TransportError:
            return False
        return self.status == 200 and not self.told

    @property
    def told(self) -> bool:
        """Whether it was told of an error in words."""
        if self.stream and self.status == 200:
            return any(line.startswith("data: ") and '"error"' in line for line in self.lines)
        return self.status is not None and self.status >= 500 and "error" in json.loads("".join(self.lines))


def kill_under_load(server: Server, title: str) -> tuple[list[Client], int]:
    """SIGKILL to the process with this title while 16 requests run, 12 of them streams; the server's exit code."""
    clients = [Client(server, stream=bool(number % 4)) for number in range(16)]
    # Where this fails before the kill, nobody goes on asking behind it.
    threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    until(lambda: all(client.began.is_set() for client in clients if client.stream))
    os.kill(process_of(server, title), signal.SIGKILL)
    killed = time.monotonic()
    code = server.process.wait(timeout=END_SECONDS)
    for thread in threads:
        thread.join(timeout=END_SECONDS)
        assert not thread.is_alive(), "a client waits for a server that is gone"
    assert time.monotonic() - killed < END_SECONDS
    return clients, code


def require_clean_end(clients: list[Client], code: int) -> None:
    assert code not in {0, None}
    # Those who asked in the moment of the death are told; those who asked later find nobody listening.
    assert all(client.told or client.refused for client in clients), clients
    assert any(client.told for client in clients if client.stream)
    assert any(client.told for client in clients if not client.stream)


# The last test of this server: nothing is left of it afterwards.
@pytest.mark.covers("killed engine", "clean error and exit")
def test_a_killed_engine_ends_the_server_with_an_error(server: Server) -> None:
    states: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                states.append(httpx.get(f"{server.url}/ready", timeout=5).status_code)
            except httpx.TransportError:
                states.append(0)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        until(lambda: states)
        assert states[0] == 200
        clients, code = kill_under_load(server, "EngineCore")
    finally:
        done.set()
        watcher.join()
    require_clean_end(clients, code)
    last_good = max(number for number, status in enumerate(states) if status == 200)
    assert all(status in {0, 503} for status in states[last_good + 1 :])
    assert states[-1] != 200


@pytest.mark.covers("killed worker", "clean error and exit")
@pytest.mark.slow
def test_a_killed_worker_ends_the_server_with_an_error(tiny: TinyModel, tmp_path: Path) -> None:
    policy = prepared(tmp_path, tiny)
    command = telltale_command(tiny.path, policy, "--distributed-executor-backend", "mp")
    with serving(command, tmp_path / "server.log") as server:
        clients, code = kill_under_load(server, "VLLM::Worker")
        require_clean_end(clients, code)


@pytest.mark.covers("card whose canary another model gives", "refused at the start")
def test_a_card_whose_canary_another_model_would_give_is_refused_at_the_start(mistaken: Refusal) -> None:
    message = mistaken.message()
    assert "canary: detector 'trigger' at position 5: expected" in message
    assert "telltale canary ARTIFACT" in message


@pytest.mark.slow
@pytest.mark.covers("worker without plug-in", "refused at the start")
def test_a_worker_without_the_plug_in_is_refused_at_the_start(tiny: TinyModel, tmp_path: Path) -> None:
    policy = prepared(tmp_path, tiny)
    (tmp_path / "plain_worker").touch()
    message = refused(
        "serve", str(tiny.path), "--policy", str(policy), *SMALL, environment=injecting(tmp_path), timeout=240
    )
    assert "a worker does not answer as a monitored one" in message
