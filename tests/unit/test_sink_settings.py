"""The ``sinks`` of a policy file: what is refused, with its reason; and the commands that use them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from monitor.events import ActedRule
from monitor.policy import compile_plan
from monitor.sinks.bound import Bound, bound_by
from monitor.sinks.dead_letters import DeadLetter, DeadLetters
from monitor.sinks.errors import SinkError
from monitor.sinks.sinks import require_sinks
from monitor.types import Action, Mode
from monitor.yaml_file import PolicyError
from serving.cli import app
from tests.support.sink_receiver import receiving
from tests.unit.artifacts import (
    D_MODEL,
    NUM_LAYERS,
    make_card,
    plan_of,
    policy_text,
    rule,
    saved_artifact,
    unit_artifact,
    write_policy,
)
from tests.unit.audit_trail import decision
from tests.unit.test_sinks import SECRET

RULE = rule("stop", when="aggregate: {kind: max}, above: {value: 2.0}")
HOOK = "name: hook, kind: webhook, secret_env: HOOK_SECRET"


def text_with(*sinks: str, more: str = "") -> str:
    return policy_text(RULE) + "sinks:\n" + "".join(f"  - {{{sink}}}\n" for sink in sinks) + more


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        (f"{HOOK}", "exactly one of 'url' and 'url_env'"),
        (f"{HOOK}, url: 'https://a.example/x', url_env: HOOK_URL", "exactly one of"),
        (f"{HOOK}, url: 'http://a.example/x'", "use https"),
        (f"{HOOK}, url: 'ftp://a.example/x'", "must look like https://HOST/PATH"),
        (f"{HOOK}, url: 'https://user:pass@a.example/x'", "a user, a password or a fragment"),
        (f"{HOOK}, url: 'https://[bad/x'", "cannot be read"),
        ("name: hook, kind: webhook, url: 'https://a.example/x'", "'secret_env' belongs to kind: webhook"),
        ("name: hook, kind: slack, url: 'https://hooks.example/x'", "name its environment variable in 'url_env'"),
        ("name: hook, kind: slack, url_env: U, secret_env: S", "Slack checks no signature"),
        ("name: hook, kind: slak, url_env: U", "Did you mean 'slack'"),
        (f"{HOOK}, url_env: hook_url", "url_env"),
        (f"{HOOK}, url_env: U, events: [decision, gaps]", "Did you mean 'gap'"),
        (f"{HOOK}, url_env: U, events: []", "events"),
        (f"{HOOK}, url_env: U, events: [gap], min_action: block", "chooses among decisions"),
        (f"{HOOK}, url_env: U, secret: abc", "'secret' is not a key here"),
        (f"{HOOK}, url_env: U, tries: 0", "tries"),
    ],
)
def test_a_wrong_sink_is_refused_with_its_line(tmp_path: Path, sink: str, message: str) -> None:
    with pytest.raises(PolicyError, match=r"telltale\.yaml:\d+: sinks") as raised:
        write_policy(tmp_path, text_with(sink))
    assert message in str(raised.value)


def test_two_sinks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="two sinks are named 'hook'"):
        write_policy(tmp_path, text_with(f"{HOOK}, url_env: A", f"{HOOK}, url_env: B"))


@pytest.mark.parametrize("audit", ["", "audit: {}\n", "audit: {text: none}\n"])
def test_a_sink_cannot_have_texts_that_nobody_keeps(tmp_path: Path, audit: str) -> None:
    with pytest.raises(PolicyError, match="it keeps none"):
        write_policy(tmp_path, text_with(f"{HOOK}, url_env: U, text: true", more=audit))


@pytest.mark.parametrize(
    ("filters", "message"), [("rules: [stopp]", "Did you mean 'stop'"), ("detectors: [harms]", "Did you mean 'harm'")]
)
def test_a_sink_that_waits_for_what_cannot_happen_is_refused(tmp_path: Path, filters: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        plan_of(tmp_path, text_with(f"{HOOK}, url_env: U, {filters}"), {"harm": unit_artifact(make_card())})


def test_where_events_go_changes_no_digest(tmp_path: Path) -> None:
    artifacts = {"harm": unit_artifact(make_card())}
    plain = plan_of(tmp_path, policy_text(RULE), artifacts)
    sunk = plan_of(tmp_path, text_with(f"{HOOK}, url_env: U"), artifacts)
    other = plan_of(tmp_path, text_with(f"{HOOK}, url_env: U").replace("2.0", "2.5"), artifacts)
    assert plain.digest == sunk.digest != other.digest


def test_texts_are_allowed_where_the_trail_keeps_some(tmp_path: Path) -> None:
    file = write_policy(tmp_path, text_with(f"{HOOK}, url_env: U, text: true", more="audit: {text: flagged}\n"))
    assert file.config.sinks[0].text
    compile_plan(file, {"harm": unit_artifact(make_card())}, d_model=D_MODEL, num_layers=NUM_LAYERS)


def test_what_an_alert_counts_goes_to_the_sink_that_it_names(tmp_path: Path) -> None:
    watched = RULE.removesuffix("}") + ", alert: {severity: warning, count: 3, within: 10m, notify: hook}}"
    alert = "alert: {severity: info, rate: 5/h, notify: chat}"
    text = text_with(
        f"{HOOK}, url_env: A", "name: chat, kind: slack, url_env: B", "name: idle, kind: slack, url_env: C"
    )
    text = text.replace(RULE, watched).replace("harm.safetensors}", f"harm.safetensors, {alert}}}")
    bound = bound_by(plan_of(tmp_path, text, {"harm": saved_artifact(tmp_path, make_card())}).alerts)
    assert bound == {
        "hook": Bound(rules=frozenset({("default", "stop")})),
        "chat": Bound(detectors=frozenset({"harm"})),
    }
    event = decision(Action.FLAG)
    acted = (ActedRule(name="stop", action=Action.FLAG, mode=Mode.SHADOW),)
    assert not bound["hook"].has(event)
    assert bound["hook"].has(event.model_copy(update={"rules": acted}))
    # A tenant's own thresholds make no other rule of it; another policy's rule of that name is another one.
    assert bound["hook"].has(event.model_copy(update={"rules": acted, "policy": "default@acme"}))
    assert not bound["hook"].has(event.model_copy(update={"rules": acted, "policy": "other"}))
    assert bound["chat"].has(event)
    assert not bound["chat"].has(decision(Action.ALLOW))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "url_env names HOOK_URL, which is not set"),
        ({"HOOK_URL": "https://a.example/T0P-S3CRET"}, "secret_env names HOOK_SECRET, which is not set"),
        ({"HOOK_URL": "http://a.example/T0P-S3CRET", "HOOK_SECRET": SECRET}, "use https"),
        ({"HOOK_URL": "https://a.example/x", "HOOK_SECRET": "T0P-S3CRET"}, "holds no secret"),
    ],
)
def test_what_the_environment_lacks_is_told_before_a_start(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    entries = [
        sink.resolved(tmp_path) for sink in write_policy(tmp_path, text_with(f"{HOOK}, url_env: HOOK_URL")).config.sinks
    ]
    with pytest.raises(SinkError, match=message) as raised:
        require_sinks(entries, environment)
    assert "T0P-S3CRET" not in str(raised.value)


def test_dead_letters_need_a_place(tmp_path: Path) -> None:
    file = write_policy(tmp_path, text_with(f"{HOOK}, url: 'https://a.example/x', dead_letters: none/dead.jsonl"))
    with pytest.raises(SinkError, match="dead letters cannot be kept"):
        require_sinks([sink.resolved(tmp_path) for sink in file.config.sinks], {"HOOK_SECRET": SECRET})


def run(*arguments: str, environment: dict[str, str]) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sinks", *arguments], env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_a_sink_is_tried_out(tmp_path: Path) -> None:
    with receiving([500]) as broken, receiving() as fine:
        one, two = f"{HOOK}, url: '{fine.url}'", "name: chat, kind: slack, url_env: CHAT"
        file = str(write_policy(tmp_path, text_with(one, two)).path)
        environment = {"HOOK_SECRET": SECRET, "CHAT": broken.url}
        assert run("test", file, environment=environment) == (
            1,
            "hook: delivered\nchat: failed: server_error, status 500\n",
        )
        assert run("test", file, "--sink", "chat", environment=environment) == (0, "chat: delivered\n")
    assert fine.got[0].content["type"] == "telltale.test"
    assert "Nothing has happened" in broken.got[0].content["text"]


def test_dead_letters_are_sent_again_once_the_receiver_is_back(tmp_path: Path) -> None:
    box = DeadLetters(tmp_path / "dead-letters.jsonl")
    box.add([DeadLetter(sink="hook", id=f"id-{n}", body=f'{{"n":{n}}}', reason="r", tries=8) for n in range(4)])
    box.add([DeadLetter(sink="gone", id="id-x", body="{}", reason="r", tries=8)])
    # The second is refused for good, at the third the receiver fails.
    with receiving([200, 400, 503]) as receiver:
        file = str(write_policy(tmp_path, text_with(f"{HOOK}, url: '{receiver.url}'")).path)
        environment = {"HOOK_SECRET": SECRET}
        assert run("replay", file, environment=environment) == (1, "hook: 1 delivered, 3 left (status 503)\n")
        assert [letter.id for letter in box.all()] == ["id-1", "id-2", "id-3", "id-x"]
        assert run("replay", file, environment=environment) == (0, "hook: 3 delivered, 0 left\n")
        assert run("replay", file, environment=environment) == (0, "hook: 0 delivered, 0 left\n")
    assert [letter.id for letter in box.all()] == ["id-x"]
    assert [got.headers["webhook-id"] for got in receiver.got] == ["id-0", "id-1", "id-2", "id-1", "id-2", "id-3"]
