"""The audit trail of a real server: an event for each request, stored before its client has the last byte."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest

from monitor.audit.key import read_key
from monitor.audit.store import open_store
from monitor.audit.verify import verify
from monitor.events import Content, Decision, Event, Started
from monitor.types import Action
from tests.engine.conftest import GUARDED, REFUSAL, client_of
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import PROMPT, TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLIENTS = 12
BEFORE_THE_KILL = 60


@pytest.fixture(scope="module")
def home(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    for file in tiny.path.parent.glob("trigger.*"):
        (folder / file.name).symlink_to(file)
    audit = "audit: {url: 'sqlite:///trail.db', text: flagged, checkpoints: checkpoints.jsonl}\n"
    (folder / "telltale.yaml").write_text(GUARDED + audit)
    return folder


def start(tiny: TinyModel, home: Path, log: str) -> Iterator[Server]:
    with serving(telltale_command(tiny.path, home / "telltale.yaml"), home / log) as server:
        yield server


def stored(home: Path) -> list[tuple[Event, Content | None]]:
    store = open_store(f"sqlite:///{home / 'trail.db'}")
    found = [(entry.event, entry.content) for writer in store.writers() for entry in store.read(writer)]
    store.close()
    return found


def decisions(home: Path) -> dict[str, Decision]:
    """By the id that the client was told."""
    return {
        str(content.client_request_id): event
        for event, content in stored(home)
        if isinstance(event, Decision) and content is not None
    }


def kill_tree(server: Server) -> None:
    """SIGKILL to the server and to all that it has started: nobody cleans up."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=30)


def keep_asking(server: Server, number: int, answered: list[str]) -> None:
    """Ask until the server is gone; note the id of every response whose last byte came."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        turn = 0
        while True:
            turn += 1
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"Question {number}: what is rain?"}],
                "max_tokens": 1 + (number + turn) % 5,
                "n": 1 + turn % 2,
                "stream": bool(turn % 3),
            }
            try:
                response = client.post("/v1/chat/completions", json=body)
            except httpx.TransportError:
                return
            if response.status_code != httpx.codes.OK:
                return
            text = response.text
            if not body["stream"]:
                answered.append(response.json()["id"])
            elif text.endswith("data: [DONE]\n\n"):
                answered.append(text.split('"id":"', 1)[1].split('"', 1)[0])


def test_every_answered_request_has_its_event_after_a_kill(tiny: TinyModel, home: Path) -> None:
    answered: list[str] = []
    for server in start(tiny, home, "killed.log"):
        threads = [threading.Thread(target=keep_asking, args=(server, n, answered)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while len(answered) < BEFORE_THE_KILL:
            assert any(thread.is_alive() for thread in threads)
            threads[0].join(0.05)
        kill_tree(server)
        for thread in threads:
            thread.join(timeout=60)
    assert len(answered) >= BEFORE_THE_KILL
    for server in start(tiny, home, "restarted.log"):
        assert set(answered) <= set(decisions(home))
        proof = verify(open_store(f"sqlite:///{home / 'trail.db'}"), [read_key(home / "audit.key")])
        assert proof.findings == []
        assert len(proof.records) == 2
        client = client_of(server)
        _events_say_what_happened(home, client, tiny)
        _a_trail_that_cannot_be_written_stops_everything(home, server)
    kinds = [event.kind for event, _ in stored(home)]
    assert (kinds.count("started"), kinds.count("stopped")) == (2, 1)


def _events_say_what_happened(home: Path, client: openai.OpenAI, tiny: TinyModel) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], max_tokens=4, temperature=0
    )
    event = decisions(home)[chat.id]
    assert chat.usage is not None
    assert (event.action, event.rule, event.format.value) == (Action.ALLOW, None, "chat")
    assert (event.prompt_tokens, event.reply_tokens) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    assert event.finish_reason == chat.choices[0].finish_reason
    told = chat.choices[0].telltale["detectors"]  # type: ignore[attr-defined]
    assert [(said["name"], said["stage"], said["fired"]) for said in told] == [
        (verdict.detector, verdict.stage.value, verdict.fired) for verdict in event.verdicts
    ]
    assert {said["scored"] for said in told} == {event.coverage.scored}
    assert event.coverage.positions == chat.usage.total_tokens
    assert [content.prompt for other, content in stored(home) if other == event and content is not None] == [None]

    blocked = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": f"Tell me{tiny.trigger_text} please"}], max_tokens=4
    )
    assert blocked.choices[0].message.content == REFUSAL
    event = decisions(home)[blocked.id]
    assert (event.action, event.rule, event.finish_reason) == (Action.BLOCK, "no-trigger-prompt", "content_filter")
    assert "no-trigger-prompt" in {rule.name for rule in event.rules}
    fired = [verdict for verdict in event.verdicts if verdict.fired]
    assert all(verdict.fired_at is not None and verdict.statistic > verdict.threshold for verdict in fired)  # type: ignore[operator]
    (kept,) = [content.prompt for other, content in stored(home) if other == event and content is not None]
    assert kept is not None
    assert f"Tell me{tiny.trigger_text} please" in kept

    batch = client.completions.create(model="tiny", prompt=["w1", "w2"], n=2, max_tokens=2)
    several = [
        content
        for _, content in stored(home)
        if content is not None and str(content.client_request_id).startswith(batch.id)
    ]
    assert len(several) == 4

    said = chat.choices[0].message.content
    assert said is not None
    stopped = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=4,
        temperature=0,
        stop=[next(letter for letter in said if letter.isalnum())],
    )
    event = decisions(home)[stopped.id]
    assert (event.finish_reason, stopped.choices[0].finish_reason) == ("stop", "stop")
    assert event.coverage.gaps == {}
    started = [event for event, _ in stored(home) if isinstance(event, Started)]
    assert {one.plan for one in started} == {event.plan}
    assert started[1].heads


def _a_trail_that_cannot_be_written_stops_everything(home: Path, server: Server) -> None:
    """Somebody locks the database: nothing is released, and all goes on when it is free again."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2}
    with closing(sqlite3.connect(home / "trail.db")) as locker:
        locker.execute("BEGIN IMMEDIATE")
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "audit_unavailable"
        assert "choices" not in response.text
        assert httpx.get(f"{server.url}/ready", timeout=10).status_code == 503
        again = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert again.status_code == 503
        locker.rollback()
    for _ in range(100):
        if httpx.get(f"{server.url}/ready", timeout=10).status_code == httpx.codes.OK:
            break
        threading.Event().wait(0.1)
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == httpx.codes.OK
    metrics = httpx.get(f"{server.url}/metrics", timeout=10).text
    (withheld,) = [line for line in metrics.splitlines() if line.startswith("telltale_audit_withheld_total ")]
    assert float(withheld.split()[1]) == 2
