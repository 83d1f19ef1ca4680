"""Sinks against a real receiver: what arrives, how it is signed, and what becomes of what does not arrive."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from monitor.events import (
    Content,
    Decision,
    Event,
    GapSeen,
)
from monitor.outlet import Outlets
from monitor.sinks.backoff import Backoff
from monitor.sinks.bound import Bound
from monitor.sinks.dead_letters import DeadLetter, DeadLetters
from monitor.sinks.delivery import Delivery
from monitor.sinks.errors import SinkError
from monitor.sinks.message import Message
from monitor.sinks.metrics import SinkMetrics
from monitor.sinks.settings import SinkEntry
from monitor.sinks.signature import ID_HEADER, TIMESTAMP_HEADER, is_signed, parse_secret
from monitor.sinks.sinks import Sinks
from monitor.types import Action, Gap, Mode
from tests.support.server import free_port
from tests.support.sink_receiver import BREAK, CUT, HANG, LONG, Receiver, receiving
from tests.unit.audit_trail import content, decision

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 - of the specification's example
ENVIRONMENT = {"HOOK_SECRET": SECRET}
QUICK = Backoff(first_seconds=0.01, longest_seconds=0.05)
KEY = parse_secret(SECRET, where="here")


def entry(url: str | None, folder: Path, **changes: Any) -> SinkEntry:
    given = {"name": "hook", "kind": "webhook", "url": url, "secret_env": "HOOK_SECRET", "timeout_seconds": 0.3}
    return SinkEntry.model_validate_json(json.dumps(given | changes)).resolved(folder)


class Open:
    """Sinks that were opened, and what they counted."""

    def __init__(self, *entries: SinkEntry, backoff: Backoff = QUICK, **more: Any) -> None:
        self.registry = CollectorRegistry()
        metrics = SinkMetrics(self.registry, [one.name for one in entries])
        environment = ENVIRONMENT | more.pop("environment", {})
        self.sinks = Sinks(entries, environment, metrics, backoff=backoff, **more)

    def count(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"telltale_sink_{name}", {"sink": "hook", **labels})
        assert value is not None
        return value

    def until(self, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.005)


@contextmanager
def opened(*entries: SinkEntry, **more: Any) -> Iterator[Open]:
    made = Open(*entries, **more)
    try:
        yield made
    finally:
        assert made.sinks.close(1.0)


def letters(folder: Path) -> list[DeadLetter]:
    return DeadLetters(folder / "dead-letters.jsonl").all()


def test_a_webhook_is_signed_and_says_what_the_event_says(tmp_path: Path) -> None:
    event = decision(Action.BLOCK)
    with receiving() as receiver, opened(entry(receiver.url, tmp_path)) as made:
        made.sinks.submit(event, lambda: content(3, tenant="acme"))
        receiver.wait_for(1)
        made.until(lambda: made.count("delivered_total") == 1)
        assert made.count("seconds_count") == 1
    (got,) = receiver.got
    assert is_signed(KEY, got.headers, got.body, now=time.time())
    assert got.headers[ID_HEADER] == str(event.id)
    assert got.content["type"] == "telltale.decision"
    assert Decision.model_validate_json(json.dumps(got.content["data"]["event"])) == event
    # No text, unless the sink may have it.
    assert got.content["data"]["request"] == {
        "request_id": "chatcmpl-3-x",
        "client_request_id": "chatcmpl-3",
        "tenant": "acme",
    }


def test_a_signature_holds_for_its_body_its_id_its_time_and_its_key_alone() -> None:
    with receiving() as receiver:
        Delivery(receiver.url, KEY, timeout_seconds=1).attempt(Message("id-1", b"{}"))
    (got,) = receiver.got
    headers, now = got.headers, time.time()
    assert is_signed(KEY, headers, got.body, now=now)
    assert not is_signed(KEY, headers, got.body + b" ", now=now)
    assert not is_signed(KEY, {**headers, ID_HEADER: "id-2"}, got.body, now=now)
    assert not is_signed(KEY, {**headers, TIMESTAMP_HEADER: str(int(now) - 60)}, got.body, now=now)
    assert not is_signed(KEY[::-1], headers, got.body, now=now)
    # Replayed later than the window, or from the future.
    assert not is_signed(KEY, headers, got.body, now=now + 301)
    assert not is_signed(KEY, headers, got.body, now=now - 302)
    assert not is_signed(KEY, {}, got.body, now=now)


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of the specification's reference library."""
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v0,old v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    assert is_signed(KEY, headers, b'{"test": 2432232314}', now=1614265330)


@pytest.mark.parametrize("text", ["", "whsec_c2hvcnQ=", "not base64 at all, is it", "whsec_" + "A" * 88])
def test_a_secret_that_is_none_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SinkError, match="openssl rand") as raised:
        parse_secret(text, where="HOOK_SECRET")
    assert not text or text not in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(500, "server_error"), (502, "server_error"), (429, "overloaded"), (HANG, "timeout"), (BREAK, "connection")],
)
def test_what_may_pass_is_tried_again(tmp_path: Path, answer: int | str, reason: str) -> None:
    with receiving([answer, answer]) as receiver, opened(entry(receiver.url, tmp_path)) as made:
        made.sinks.submit(decision())
        receiver.wait_for(3)
        made.until(lambda: made.count("delivered_total") == 1)
        assert made.count("failed_total", reason=reason) == 2
    assert len({got.headers[ID_HEADER] for got in receiver.got}) == 1
    assert letters(tmp_path) == []


@pytest.mark.parametrize(("answer", "reason"), [(400, "refused"), (404, "refused"), (410, "refused")])
def test_what_will_not_pass_is_not_tried_again(tmp_path: Path, answer: int, reason: str) -> None:
    with receiving([answer]) as receiver, opened(entry(receiver.url, tmp_path)) as made:
        made.sinks.submit(decision())
        made.until(lambda: made.count("dead_letters_total") == 1)
        assert made.count("failed_total", reason=reason) == 1
    assert len(receiver.got) == 1
    (letter,) = letters(tmp_path)
    assert (letter.sink, letter.tries, letter.reason) == ("hook", 1, f"status {answer}")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(tmp_path: Path, status: int) -> None:
    with receiving() as elsewhere, receiving([(status, {"location": elsewhere.url})]) as receiver:
        with opened(entry(receiver.url, tmp_path)) as made:
            made.sinks.submit(decision())
            made.until(lambda: made.count("dead_letters_total") == 1)
            assert made.count("failed_total", reason="redirect") == 1
        assert elsewhere.got == []


def test_a_message_is_given_up_after_so_many_tries_and_kept(tmp_path: Path) -> None:
    event = decision()
    with receiving([500] * 9) as receiver, opened(entry(receiver.url, tmp_path, tries=3)) as made:
        made.sinks.submit(event)
        made.until(lambda: made.count("dead_letters_total") == 1)
    assert len(receiver.got) == 3
    (letter,) = letters(tmp_path)
    assert (letter.id, letter.tries, letter.reason) == (str(event.id), 3, "status 500")
    assert letter.body.encode() == receiver.got[0].body
    assert (tmp_path / "dead-letters.jsonl").stat().st_mode & 0o777 == 0o600


def test_nobody_listens(tmp_path: Path) -> None:
    with opened(entry(f"http://127.0.0.1:{free_port()}/hook", tmp_path, tries=2)) as made:
        made.sinks.submit(decision())
        made.until(lambda: made.count("dead_letters_total") == 1)
        assert made.count("failed_total", reason="connection") == 2


def test_messages_share_a_connection(tmp_path: Path) -> None:
    with receiving([200, 204, 400, 200]) as receiver, opened(entry(receiver.url, tmp_path)) as made:
        for number in range(1, 5):
            made.sinks.submit(decision())
            receiver.wait_for(number)
        made.until(lambda: made.count("delivered_total") == 3)
    assert len({got.connection for got in receiver.got}) == 1


@pytest.mark.parametrize("answer", [CUT, LONG])
def test_what_follows_the_head_of_an_answer_changes_nothing(tmp_path: Path, answer: str) -> None:
    with receiving([answer]) as receiver, opened(entry(receiver.url, tmp_path)) as made:
        made.sinks.submit(decision())
        made.sinks.submit(decision())
        made.until(lambda: made.count("delivered_total") == 2)
    assert len(receiver.got) == 2


def test_a_sink_that_hangs_holds_up_nobody_and_drops_are_counted(tmp_path: Path) -> None:
    count = 2000
    hanging = entry(None, tmp_path, url_env="URL", queue=16, timeout_seconds=30)
    with receiving([HANG]) as stuck, receiving() as fine:
        other = entry(fine.url, tmp_path, name="other", queue=count)
        with opened(hanging, other, environment={"URL": stuck.url}) as made:
            made.sinks.submit(decision())
            stuck.wait_for(1)
            began = time.perf_counter()
            for _ in range(count):
                made.sinks.submit(decision())
            assert time.perf_counter() - began < 2.0
            assert made.count("dropped_total") == count - 16
            assert made.count("queue") == 17
            # The other one has its own queue and its own thread.
            fine.wait_for(count, seconds=60)
            stuck.released.set()
        assert len(stuck.got) + len(letters(tmp_path)) >= 17


def test_what_waits_when_the_server_ends_is_sent_or_kept(tmp_path: Path) -> None:
    events = [decision() for _ in range(8)]
    with receiving([500]) as receiver:
        made = Open(entry(receiver.url, tmp_path), backoff=Backoff(first_seconds=1e6, longest_seconds=1e6))
        made.sinks.submit(events[0])
        made.until(lambda: made.count("failed_total", reason="server_error") == 1)
        for event in events[1:]:
            made.sinks.submit(event)
        assert made.sinks.close(2.0)
        sent = [got.headers[ID_HEADER] for got in receiver.got]
    assert sent == [str(event.id) for event in events]
    assert [letter.id for letter in letters(tmp_path)] == [str(events[0].id)]


def test_at_the_end_a_hanging_sink_is_not_waited_for_and_nothing_is_lost(tmp_path: Path) -> None:
    with receiving([HANG] * 20) as receiver:
        made = Open(entry(receiver.url, tmp_path, timeout_seconds=0.2))
        for _ in range(10):
            made.sinks.submit(decision())
        began = time.monotonic()
        assert made.sinks.close(0.5)
        assert time.monotonic() - began < 2.0
        receiver.released.set()
    assert len(letters(tmp_path)) == 10


def test_slack_gets_a_text_in_which_nothing_calls_a_channel_together(tmp_path: Path) -> None:
    with receiving() as receiver:
        slack = entry(None, tmp_path, kind="slack", url_env="SLACK", secret_env=None)
        with opened(slack, environment={"SLACK": receiver.url}) as made:
            about = Content(request_id="r", client_request_id="<!channel> & co", tenant="acme", prompt="secret text")
            made.sinks.submit(decision(Action.BLOCK), lambda: about)
            receiver.wait_for(1)
    (got,) = receiver.got
    said = got.content["text"]
    assert "block by no-harm" in said
    assert "&lt;!channel&gt; &amp; co" in said
    assert "<" not in said
    assert "secret text" not in said
    assert "webhook-signature" not in got.headers


def test_texts_leave_only_where_the_sink_says_so(tmp_path: Path) -> None:
    about = content(1)
    with receiving() as receiver, opened(entry(receiver.url, tmp_path, text=True)) as made:
        made.sinks.submit(decision(), lambda: about)
        receiver.wait_for(1)
    assert receiver.got[0].content["data"]["request"]["prompt"] == about.prompt


def sent(receiver: Receiver) -> list[str]:
    return [got.headers[ID_HEADER] for got in receiver.got]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["flag", "block", "gap"]),
        ({"min_action": "block"}, ["block", "gap"]),
        ({"min_action": "allow"}, ["allow", "flag", "block", "gap"]),
        ({"events": ["gap"]}, ["gap"]),
        ({"events": ["decision"]}, ["flag", "block"]),
        ({"rules": ["other"]}, ["gap"]),
        ({"rules": ["other", "no-harm"]}, ["flag", "block", "gap"]),
        ({"detectors": ["harm"]}, ["flag", "block", "gap"]),
        ({"detectors": ["toxicity"]}, ["gap"]),
    ],
)
def test_a_sink_gets_what_it_asks_for(tmp_path: Path, changes: dict[str, Any], wanted: list[str]) -> None:
    events: dict[str, Event] = {action: decision(Action(action)) for action in ("allow", "flag", "block")}
    events["gap"] = GapSeen(plan="p", gaps={Gap.UNSEEN: 3})
    with receiving() as receiver, opened(entry(receiver.url, tmp_path, **changes)) as made:
        for event in events.values():
            made.sinks.submit(event)
        receiver.wait_for(len(wanted))
    assert sent(receiver) == [str(events[name].id) for name in wanted]


def test_shadow_rules_count_if_asked_for(tmp_path: Path) -> None:
    blocked = decision(Action.BLOCK)
    rules = tuple(rule.model_copy(update={"mode": Mode.SHADOW}) for rule in blocked.rules)
    event = blocked.model_copy(update={"rules": rules, "action": Action.ALLOW, "rule": None})
    with receiving() as quiet, receiving() as told:
        one, two = entry(quiet.url, tmp_path), entry(told.url, tmp_path, name="two", shadow=True)
        with opened(one, two) as made:
            made.sinks.submit(event)
            told.wait_for(1)
    assert sent(quiet) == []


def test_what_is_bound_to_a_sink_goes_there_whatever_it_chooses(tmp_path: Path) -> None:
    bound = {"hook": Bound(rules=frozenset({("default", "no-harm")}))}
    with receiving() as receiver, opened(entry(receiver.url, tmp_path, events=["gap"])) as made:
        made.sinks.submit(decision(Action.FLAG))
        made.sinks.bind(bound)
        made.sinks.submit(decision(Action.FLAG).model_copy(update={"policy": "other"}))
        made.sinks.submit(decision(Action.FLAG))
        made.sinks.submit(decision(Action.ALLOW))
        receiver.wait_for(1)
    assert len(receiver.got) == 1


def test_dead_letters_are_taken_out_one_by_one_while_others_are_added(tmp_path: Path) -> None:
    box = DeadLetters(tmp_path / "dead.jsonl")
    made = [
        DeadLetter(sink="hook", id=str(number), body="{}", reason="r", tries=1, time=datetime.now(UTC))
        for number in range(40)
    ]
    box.add(made[:20])

    def add() -> None:
        for letter in made[20:]:
            DeadLetters(tmp_path / "dead.jsonl").add([letter])

    thread = threading.Thread(target=add)
    thread.start()
    for letter in made[:20]:
        box.remove({letter.key})
    thread.join()
    assert [letter.id for letter in box.all()] == [letter.id for letter in made[20:]]


def test_a_damaged_file_of_dead_letters_is_told_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "dead.jsonl"
    DeadLetters(file).add([DeadLetter(sink="hook", id="1", body="{}", reason="r", tries=1)])
    file.write_bytes(file.read_bytes() + b"{half\n")
    before = file.read_bytes()
    with pytest.raises(SinkError, match=r"dead\.jsonl:2"):
        DeadLetters(file).remove(set())
    assert file.read_bytes() == before


def test_pauses_grow_up_to_a_bound_and_heed_the_receiver() -> None:
    backoff = Backoff()
    for failures in range(1, 20):
        end = min(60.0, 0.5 * 2 ** (failures - 1))
        drawn = [backoff.pause(failures) for _ in range(200)]
        assert 0 <= min(drawn) <= max(drawn) <= end
        assert max(drawn) > end / 2
    assert 7 <= backoff.pause(1, 7.0) <= 60
    assert backoff.pause(1, 1e9) == 60


def test_one_way_in_for_all_outlets(tmp_path: Path) -> None:
    with receiving() as receiver, opened(entry(receiver.url, tmp_path)) as made:
        assert Outlets([made.sinks, made.sinks]).submit(decision()) is None
        receiver.wait_for(2)
    assert Outlets([]).submit(decision()) is None
