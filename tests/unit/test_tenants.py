"""Several policies: who gets which, judged as if each were alone, and the strictest for whom nobody vouches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from typer.testing import CliRunner

from monitor.exporter import Exporter
from monitor.monitor import Monitor
from monitor.policy import Plan, compile_plan
from monitor.report import make_report, take_tally
from monitor.rollout import Subjects
from monitor.types import Action
from monitor.yaml_file import PolicyError
from probes.card import Format
from serving.api.callers import Callers
from serving.api.middleware import MonitorMiddleware
from serving.cli import app
from serving.origin import current_origin
from tests.unit.artifacts import D_MODEL, NUM_LAYERS, make_card, saved_artifact, unit_artifact, write_policy
from tests.unit.script import Part, Script, chat

KEYS = {name: f"key of {name}" for name in ("acme", "globex", "gateway")}
DIGESTS = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
RULES = {
    "lax": "{name: stop, when: {detector: a, stage: stream, aggregate: {kind: max}, above: {value: 2}}, "
    "do: {action: block}, mode: enforce}",
    "strict": "{name: stop, when: {detector: a, stage: stream, aggregate: {kind: max}, above: {value: 0.5}}, "
    "do: {action: block}, mode: enforce}",
    "other": "{name: note, when: {all: [{detector: a, stage: prompt, aggregate: {kind: max}, above: {value: 0.5}}, "
    "{not: {detector: b, stage: prompt, aggregate: {kind: max}, above: {value: 0.5}}}]}, do: {action: flag}, "
    "mode: enforce}",
}
TENANTS = [
    f"{{name: acme, key_sha256: {DIGESTS['acme']}, policy: strict, above: {{stop: {{value: 1}}}}}}",
    f"{{name: globex, key_sha256: {DIGESTS['globex']}, policy: lax, by_model: {{tiny: lax, tiny-other: other}}}}",
    f"{{name: gateway, key_sha256: {DIGESTS['gateway']}, policy: strict, by_header: [lax, other]}}",
]  # fmt: skip


def policy_of(*names: str, tenants: list[str] | None = None, settings: dict[str, str] | None = None) -> str:
    policies = "".join(
        f"  - name: {name}\n    on_gap: flag\n    on_uncalibrated: flag\n"
        + "".join(f"    {line}\n" for line in (settings or {}).get(name, "").splitlines())
        + f"    rules:\n      - {RULES[name]}\n"
        for name in names
    )
    listed = "".join(f"  - {tenant}\n" for tenant in tenants or [])
    return (
        'version: "1"\ndetectors:\n  - {artifact: a.safetensors}\n  - {artifact: b.safetensors}\n'
        f"policies:\n{policies}" + (f"tenants:\n{listed}" if listed else "")
    )


def plan_of(folder: Path, text: str) -> Plan:
    artifacts = {name: unit_artifact(make_card(name), number) for number, name in enumerate("ab")}
    return compile_plan(write_policy(folder, text), artifacts, d_model=D_MODEL, num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(tmp_path_factory.mktemp("plan"), policy_of("lax", "strict", "other", tenants=TENANTS))


def test_policies_and_those_with_a_tenants_thresholds(plan: Plan) -> None:
    assert [policy.name for policy in plan.policies] == POLICIES
    limits = [
        plan.checks[policy.rules[0].verdicts[0]].thresholds[Format.CHAT]
        for policy in plan.policies
        if policy.rules[0].name == "stop"
    ]
    assert limits == [2, 0.5, 1]
    acme, globex, gateway = (plan.tenants[DIGESTS[name]] for name in KEYS)
    assert (acme.policy, acme.by_model, acme.by_header) == ("strict@acme", None, {})
    assert (globex.policy, globex.by_model) == ("lax", {"tiny": "lax", "tiny-other": "other"})
    assert (gateway.policy, gateway.by_header) == ("strict", {"lax": "lax", "other": "other"})


def test_every_tenant_changes_the_digest(tmp_path: Path) -> None:
    texts = [policy_of("lax", "strict", "other", tenants=tenants) for tenants in (TENANTS, list(reversed(TENANTS)))]
    texts.append(texts[0].replace("{value: 1}", "{value: 1.5}"))
    assert len({plan_of(tmp_path, text).digest for text in texts}) == 3


POLICIES = ["lax", "strict", "other", "strict@acme", "strictest"]


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[str, np.ndarray]]:
    names = draw(st.lists(st.sampled_from(POLICIES), min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [(name, rng.normal(0, 1.2, (int(rng.integers(2, 9)), 2)).astype(np.float32)) for name in names]


def run(plan: Plan, batch: list[tuple[str, np.ndarray]]) -> list[tuple[Action, set[str]]]:
    """All requests at once, a token each in every step after their prompts of two."""
    monitor, script = Monitor(plan), Script(plan)
    for number, (policy, _) in enumerate(batch):
        monitor.admit(str(number), num_prompt=2, policy=policy, fmt=Format.CHAT, prompt=chat(2))
    for start, stop in [(0, 2), *((at, at + 1) for at in range(2, 9))]:
        parts: list[Part] = [
            (str(number), range(start, stop), script.rows(scores[start:stop]))
            for number, (_, scores) in enumerate(batch)
            if stop <= len(scores)
        ]
        monitor.observe(script.step(parts))
    found = []
    for number, (_, scores) in enumerate(batch):
        ended = monitor.finish(str(number), num_positions=len(scores), sampled=0, aborted=False)
        assert ended is not None
        found.append((ended.request.action.action, ended.request.decided))
    return found


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_in_a_mixed_batch_each_request_gets_what_its_policy_alone_gives(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory, batch: list[tuple[str, np.ndarray]]
) -> None:
    found = run(plan, batch)
    for (name, scores), (action, decided) in zip(batch, found, strict=True):
        if name == "strictest":
            others = run(plan, [(policy.name, scores) for policy in plan.policies[:-1]])
            assert action == max((other for other, _ in others), key=lambda item: item.severity)
            assert decided == {
                f"{policy.name}/{rule}"
                for policy, (_, rules) in zip(plan.policies[:-1], others, strict=True)
                for rule in rules
            }
            continue
        text = policy_of(name.partition("@")[0])
        if "@" in name:
            text = text.replace("value: 0.5", "value: 1")
        alone = plan_of(tmp_path_factory.mktemp("alone"), text)
        assert run(alone, [(alone.policies[0].name, scores)]) == [(action, decided)]


def test_the_strictest_takes_the_most_severe_of_everything(tmp_path: Path) -> None:
    settings = {"lax": "hold_back: 4\nexpose: scores", "strict": "hold_back: 1"}
    text = policy_of("lax", "strict", "other", tenants=TENANTS, settings=settings)
    text = text.replace("on_gap: flag", "on_gap: block", 1)
    plan = plan_of(tmp_path, text)
    policy = plan.policies[plan.strictest]
    assert (policy.name, policy.on_gap, policy.hold_back, policy.expose.value) == (
        "strictest", Action.BLOCK, 4, "actions",
    )  # fmt: skip
    assert [rule.name for rule in policy.rules] == ["lax/stop", "strict/stop", "other/note", "strict@acme/stop"]
    monitor = Monitor(plan)
    unknown = monitor.admit("a", num_prompt=1, policy="no such policy", fmt=Format.RAW)
    assert monitor.policy_of(unknown) is policy
    assert monitor.policy_of(monitor.admit("b", num_prompt=1, policy=None, fmt=Format.RAW)) is plan.policies[0]


def test_metrics_carry_the_policys_name(plan: Plan) -> None:
    registry = CollectorRegistry()
    exporter = Exporter(plan, registry)
    monitor, script = Monitor(plan), Script(plan)
    for name in ("lax", "strict"):
        monitor.admit(name, num_prompt=1, policy=name, fmt=Format.CHAT, prompt=chat(1))
        monitor.observe(script.step([(name, range(2), script.rows([[0, 0], [1, 0]]))]))
        ended = monitor.finish(name, num_positions=2, sampled=0, aborted=False)
        assert ended is not None
        exporter.record(make_report(monitor, [], [ended], take_tally(monitor, [])))

    def count(metric: str, **labels: str) -> float | None:
        return registry.get_sample_value(metric, labels)

    names = ("lax", "strict", "strict@acme")
    acted = {"rule": "stop", "action": "block", "mode": "enforce"}
    assert [count("telltale_actions_total", policy=name, **acted) for name in names] == [0, 1, 0]
    assert count("telltale_requests_total", policy="lax", action="allow") == 1
    assert count("telltale_requests_total", policy="strict", action="block") == 1
    where = {"rule": "stop", "detector": "a", "stage": "stream", "format": "chat"}
    assert [count("telltale_detector_threshold", policy=name, **where) for name in names] == [2, 0.5, 1]


def test_metrics_tell_tenants_of_the_file_and_nobody_else(plan: Plan) -> None:
    registry = CollectorRegistry()
    exporter = Exporter(plan, registry)
    monitor, script = Monitor(plan), Script(plan)
    for name, tenant in (("a", "acme"), ("b", "acme"), ("c", ""), ("d", "0123456789abcdef"), ("e", "made up")):
        subjects = Subjects(tenant, "", name)
        monitor.admit(name, num_prompt=1, policy="strict", fmt=Format.CHAT, prompt=chat(1), subjects=subjects)
        monitor.observe(script.step([(name, range(2), script.rows([[0, 0], [1, 0]]))]))
        ended = monitor.finish(name, num_positions=2, sampled=0, aborted=False)
        assert ended is not None
        exporter.record(make_report(monitor, [], [ended], take_tally(monitor, [])))
    found = {
        sample.labels["tenant"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "telltale_tenant_requests_total" and sample.labels["action"] == "block"
    }
    assert found == {"-": 3} | dict.fromkeys((tenant.name for tenant in plan.tenants.values()), 0) | {"acme": 2}
    assert registry.get_sample_value("telltale_tenant_rules_total", {"tenant": "acme", "rule": "stop"}) == 2
    scored = registry.get_sample_value("telltale_tenant_tokens_scored_total", {"tenant": "acme"})
    assert scored == 2 * (2 - max(check.skip_first for check in plan.checks))


REFUSED = [
    (policy_of("lax", "strict"), "policies[1].name: is 'strict', which no request would get"),
    (policy_of("lax", "lax"), "two policies are named 'lax'"),
    (policy_of("lax").replace("name: lax", "name: strictest"), "'strictest' is what the policy of requests without"),
    (policy_of("lax", tenants=[TENANTS[0]]), "tenants[0].policy: is 'strict'. Known: lax."),
    (policy_of("lax", tenants=[TENANTS[1]]), "tenants[0].by_model.tiny-other: is 'other'. Known: lax."),
    (policy_of("lax", "strict", tenants=[TENANTS[2]]), "tenants[0].by_header[1]: is 'other'. "),
    (policy_of("lax", "strict", tenants=[TENANTS[0], TENANTS[0]]), "two tenants are named 'acme'"),
    (policy_of("lax", "strict", tenants=[TENANTS[0], TENANTS[0].replace("name: acme", "name: b")]), "told by the key"),
    (policy_of("lax", "strict", tenants=[TENANTS[0].replace("{stop", "{stopp")]), "above.stopp: 'stopp' is no rule"),
    (policy_of("lax", "strict", tenants=[TENANTS[0].replace("{value: 1}", "{target_fpr: 0.1}")]),
     "tenants[0].above: with these thresholds: "),
    (policy_of("lax", "other", tenants=[TENANTS[0].replace("strict", "other").replace("{stop", "{note")]),
     "tenants[0].above.note: the rule 'note' joins, weighs or accumulates verdicts"),
    (policy_of("lax", "strict", tenants=[TENANTS[0].replace(DIGESTS["acme"], KEYS["acme"])]), "key_sha256: is 'key of"),
    (policy_of("lax", "strict", tenants=[TENANTS[2].replace("[lax, other]", "[lax, lax]")]), "names 'lax' twice"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_what_cannot_be_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        plan_of(tmp_path, text)
    assert words in str(caught.value)
    assert "telltale.yaml:" in str(caught.value)


async def who(_: Request) -> Response:
    caller = current_origin().caller
    return PlainTextResponse(f"{caller.tenant}:{caller.policy}")


def client_of(plan: Plan) -> TestClient:
    callers = Callers()
    callers.accept(plan.tenants)
    routes = [Route("/{path:path}", who, methods=["GET", "POST", "OPTIONS"])]
    return TestClient(MonitorMiddleware(Starlette(routes=routes), callers=callers))


def bearer(name: str, **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"} | {key.replace("_", "-"): value for key, value in headers.items()}


CHAT = "/v1/chat/completions"
ANSWERED = [
    (bearer("acme"), {"model": "anything"}, "acme:strict@acme"),
    (bearer("globex"), {"model": "tiny"}, "globex:lax"),
    (bearer("globex"), {"model": "tiny-other"}, "globex:other"),
    (bearer("globex"), {}, "globex:lax"),
    (bearer("gateway"), {"model": "tiny-other"}, "gateway:strict"),
    (bearer("gateway", x_telltale_policy="other"), {}, "gateway:other"),
]
TURNED_AWAY: list[tuple[dict[str, str], dict[str, Any], int, str]] = [
    ({}, {}, 401, "invalid_api_key"),
    ({"authorization": "Bearer "}, {}, 401, "invalid_api_key"),
    ({"authorization": f"Bearer {KEYS['acme']}x"}, {}, 401, "invalid_api_key"),
    ({"authorization": f"Basic {KEYS['acme']}"}, {}, 401, "invalid_api_key"),
    ({"authorization": f"Bearer {DIGESTS['acme']}"}, {}, 401, "invalid_api_key"),
    (bearer("globex"), {"model": "tiny-strict"}, 404, "model_not_found"),
    (bearer("globex"), {"model": ["tiny"]}, 404, "model_not_found"),
    (bearer("acme", x_telltale_policy="lax"), {}, 403, "header_refused"),
    (bearer("globex", x_telltale_policy="lax"), {"model": "tiny"}, 403, "header_refused"),
    (bearer("acme", x_telltale_tenant="globex"), {}, 403, "header_refused"),
    (bearer("gateway", x_telltale_policy="strict"), {}, 403, "policy_refused"),
    (bearer("gateway", x_telltale_policy="strictest"), {}, 403, "policy_refused"),
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/invocations", "/anything"])
@pytest.mark.parametrize(("headers", "body", "expected"), ANSWERED)
def test_a_key_gives_its_policy(plan: Plan, path: str, headers: dict[str, str], body: Any, expected: str) -> None:
    assert client_of(plan).post(path, json=body, headers=headers).text == expected


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/invocations", "/anything", "/v1/models", "/"])
@pytest.mark.parametrize("case", TURNED_AWAY)
def test_no_key_and_no_header_gives_more(
    plan: Plan, path: str, case: tuple[dict[str, str], dict[str, Any], int, str]
) -> None:
    headers, body, status, code = case
    answer = client_of(plan).post(path, json=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert not any(secret in answer.text for secret in (*KEYS.values(), *DIGESTS.values()))


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version", "/ping", "/docs", "/telltale/v1/policy"])
def test_what_reaches_no_model_is_no_tenants(plan: Plan, path: str) -> None:
    assert client_of(plan).get(path).text == ":None"
    assert client_of(plan).options(CHAT).status_code == 200


def test_the_model_is_read_in_whatever_encoding_vllm_reads_it(plan: Plan) -> None:
    for encoding in ("utf-8", "utf-16", "utf-32"):
        body = json.dumps({"model": "tiny-other"}).encode(encoding)
        assert client_of(plan).post(CHAT, content=body, headers=bearer("globex")).text == "globex:other"
    assert client_of(plan).post(CHAT, content=b"{not json", headers=bearer("globex")).text == "globex:lax"


def test_whom_a_proxy_sends_for_is_a_tenant_of_its_own(plan: Plan) -> None:
    found = [
        client_of(plan).post(CHAT, json={}, headers=bearer("gateway", x_telltale_tenant=name)).text
        for name in ("one", "two", "one")
    ]
    assert found[0] == found[2] != found[1]
    assert all(text.startswith("gateway/") for text in found)


def test_no_socket_without_a_key(plan: Plan) -> None:
    with pytest.raises(WebSocketDisconnect), client_of(plan).websocket_connect("/v1/realtime"):
        pass


def test_check_says_who_gets_what(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        saved_artifact(tmp_path, make_card(name), number)
    path = tmp_path / "telltale.yaml"
    path.write_text(policy_of("lax", "strict", "other", tenants=TENANTS))
    result = CliRunner().invoke(app, ["check", str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for words in (
        "tenant acme: policy strict@acme",
        "tenant globex: policy lax, lax for the model 'tiny', other for the model 'tiny-other'",
        "tenant gateway: policy strict, lax if a proxy says 'lax', other if a proxy says 'other'",
        "policy strictest",
        "access: inference keyed; metrics open on the loopback address, keyed elsewhere; no limit of requests;",
    ):
        assert words in result.output


def test_check_says_which_keys_there_are(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        saved_artifact(tmp_path, make_card(name), number)
    path = tmp_path / "telltale.yaml"
    keys = f"[{{name: ops, key_sha256: {'0f' * 32}, scopes: [observe, admin]}}]"
    path.write_text(f"{policy_of('lax')}access:\n  requests_per_minute: 9\n  keys: {keys}\n")
    result = CliRunner().invoke(app, ["check", str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for words in (
        "key ops: observe, admin",
        "access: inference open on the loopback address, keyed by VLLM_API_KEY elsewhere; metrics open on the",
        "9 requests a minute; bodies up to 67108864 bytes",
    ):
        assert words in " ".join(result.output.split())
