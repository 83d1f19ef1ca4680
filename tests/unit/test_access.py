"""The outermost layer: who gets an answer, on every path."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from monitor.access import Access, KeyScope
from monitor.tenants import Tenant
from serving.api.access import Gate, put_before
from serving.api.access_metrics import AccessMetrics
from serving.api.binding import AccessError, is_local, require_keys
from serving.api.keyring import Holder, KeyRing, digest_of, new_key
from serving.api.paths import Need, is_for_tenants, need_of, path_in
from serving.api.refusal import Reason
from tests.unit.access_client import CHAT, KEYS, OPEN_RING, POLICY, RING, bearer, make_client

WHO_MAY = [
    ("POST", CHAT, {"sender", "both"}),
    ("POST", f"{CHAT}/", {"sender", "both"}),
    ("POST", "/invocations", {"sender", "both"}),
    ("POST", "/tokenize", {"sender", "both"}),
    ("GET", "/v1/models", {"sender", "both"}),
    ("GET", "/v1/responses/resp_1", {"sender", "both"}),
    ("POST", "/v1/responses/resp_1/cancel", {"sender", "both"}),
    ("GET", "/version", set(KEYS)),
    ("GET", "/metrics", {"watcher", "admin", "both"}),
    ("GET", "/metrics/", {"watcher", "admin", "both"}),
    ("GET", "/docs", {"watcher", "admin", "both"}),
    ("GET", "/redoc", {"watcher", "admin", "both"}),
    ("GET", "/openapi.json", {"watcher", "admin", "both"}),
    ("GET", "/load", {"watcher", "admin", "both"}),
    ("GET", POLICY, {"watcher", "admin", "both"}),
    ("HEAD", POLICY, {"watcher", "admin", "both"}),
    ("PUT", POLICY, {"admin"}),
    ("POST", f"{POLICY}/rollback", {"admin"}),
    ("DELETE", POLICY, {"admin"}),
    ("OPTIONS", POLICY, {"admin"}),
    ("POST", "/scale_elastic_ep", set()),
    ("POST", "/inference/v1/generate", set()),
    ("POST", "/collective_rpc", set()),
    ("POST", "/sleep", set()),
    ("GET", "/server_info", set()),
    ("GET", "/", set()),
    ("POST", "//v1/chat/completions", set()),
    ("POST", "/V1/chat/completions", set()),
    ("POST", "/v1/chat/completions/../../sleep", set()),
    ("GET", "/telltalex", set()),
    ("GET", "/metricsx", set()),
    ("GET", "/v1/responses/a/b", set()),
]


@pytest.mark.parametrize(("method", "path", "allowed"), WHO_MAY, ids=lambda value: str(value)[:40])
def test_a_path_answers_the_keys_that_have_its_scope(method: str, path: str, allowed: set[str]) -> None:
    client = make_client()
    found = {}
    for name in KEYS:
        answer = client.request(method, path, headers=bearer(name))
        found[name] = answer.status_code
    assert {name for name, status in found.items() if status == 200} == allowed
    refused = {status for status in found.values() if status != 200}
    assert refused <= ({403} if allowed else {404})


@pytest.mark.parametrize("path", [path for _, path, _ in WHO_MAY])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer none"},
        {"authorization": f"Basic {KEYS['admin']}"},
        {"authorization": KEYS["admin"]},
        {"authorization": f"Bearer {KEYS['admin']}x"},
        {"authorization": f"Bearer {digest_of(KEYS['admin'])}"},
        {"x-api-key": KEYS["admin"]},
        {"cookie": f"authorization={KEYS['admin']}"},
    ],
    ids=lambda headers: str(headers)[:30],
)
def test_without_a_key_every_path_says_the_same(path: str, headers: dict[str, str]) -> None:
    """Those that exist and those that do not: nobody learns which."""
    client = make_client()
    answers = [client.get(path, headers=headers), client.get("/no/such/path", headers=headers)]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].content == answers[1].content
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    secrets = [*KEYS.values(), *map(digest_of, KEYS.values())]
    assert not any(secret in answers[0].text for secret in secrets)


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_probes_of_load_balancers_need_no_key(path: str) -> None:
    assert make_client().get(path).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/invocations", "/tokenize", "/v1/models", "/version"])
def test_where_inference_is_open_any_key_or_none_will_do(path: str) -> None:
    client = make_client(ring=OPEN_RING)
    for headers in ({}, {"authorization": "Bearer none"}, bearer("watcher")):
        assert client.post(path, headers=headers).status_code == 200
    for other, status in ((POLICY, 401), ("/docs", 401), ("/openapi.json", 401), ("/redoc", 401), ("/sleep", 404)):
        assert client.get(other).status_code == status
    assert client.put(POLICY, headers=bearer("watcher")).status_code == 403


def test_a_server_that_is_not_told_its_keys_answers_nothing() -> None:
    app = FastAPI()
    put_before(app, Gate())
    for path in ("/health", CHAT, "/metrics", "/docs"):
        assert TestClient(app).get(path).status_code == 503


def test_who_is_turned_away_is_counted_by_the_reason_that_he_is_told() -> None:
    gate, registry = Gate(), CollectorRegistry()
    gate.turned_away = AccessMetrics(registry).turned_away
    client = make_client(Access(requests_per_minute=3, body_bytes=1024), gate=gate)
    requests: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {}),
        (CHAT, {"headers": bearer("watcher")}),
        ("/no/such/path", {"headers": bearer("admin")}),
        (CHAT, {"headers": bearer("sender"), "content": b"x" * 2000}),
        *[(CHAT, {"headers": bearer("both")})] * 4,
    ]
    told = [client.post(path, **rest) for path, rest in requests]
    codes = [answer.json()["error"]["code"] for answer in told if answer.status_code != 200]
    assert len(codes) == 5 == len(set(codes))
    for reason in Reason:
        found = registry.get_sample_value("telltale_turned_away_total", {"reason": reason.value})
        assert found == codes.count(reason.value)


def test_other_keys_hold_from_the_next_request_on() -> None:
    gate = Gate()
    client = make_client(gate=gate)
    assert client.post(CHAT, headers=bearer("sender")).status_code == 200
    gate.accept(Access(), KeyRing([Holder(digest_of("new"), frozenset({KeyScope.INFER}))]), local=False)
    assert client.post(CHAT, headers=bearer("sender")).status_code == 401
    assert client.post(CHAT, headers={"authorization": "Bearer new"}).status_code == 200


@pytest.mark.parametrize(
    ("said", "local", "proxied", "status"),
    [
        (None, True, False, 200),
        (None, True, True, 401),
        (None, False, False, 401),
        ("open", False, True, 200),
        ("keyed", True, False, 401),
    ],
)
def test_metrics_are_open_on_this_machine_unless_the_file_says_more(
    said: str | None, local: bool, proxied: bool, status: int
) -> None:
    access = Access.model_validate_json("{}" if said is None else f'{{"metrics": "{said}"}}')
    client = make_client(access, local=local)
    for header in ("x-forwarded-for", "forwarded", "via", "x-real-ip") if proxied else ("x-nothing",):
        assert client.get("/metrics", headers={header: "10.0.0.1"}).status_code == status
    assert client.get("/metrics", headers=bearer("watcher")).status_code == 200
    assert client.get("/docs").status_code == 401


class TestTheGateIsOutermost:
    def test_of_what_is_added_later(self) -> None:
        app, gate, seen = FastAPI(), Gate(), []
        put_before(app, gate)

        class Curious:
            def __init__(self, inner: Any) -> None:
                self._inner = inner

            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                seen.append(scope.get("path"))
                await self._inner(scope, receive, send)

        app.add_middleware(Curious)
        gate.accept(Access(), RING, local=False)
        assert TestClient(app).get("/openapi.json").status_code == 401
        assert not seen
        assert TestClient(app).get("/openapi.json", headers=bearer("watcher")).status_code == 200
        assert seen == ["/openapi.json"]

    def test_a_preflight_is_answered_without_a_key_and_reaches_no_route(self) -> None:
        client = make_client()
        asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
        answer = client.options(POLICY, headers=asked)
        assert answer.status_code == 200
        assert "access-control-allow-origin" in answer.headers
        assert "body" not in answer.text
        for missing in asked:
            headers = {key: value for key, value in asked.items() if key != missing}
            assert client.options(POLICY, headers=headers).status_code == 401

    def test_no_web_socket_is_opened_with_any_key(self) -> None:
        for name in KEYS:
            with (
                pytest.raises(WebSocketDisconnect),
                make_client().websocket_connect("/v1/realtime", headers=bearer(name)),
            ):
                pass

    def test_below_a_root_path(self) -> None:
        client = make_client(root="/llm")
        for path in (f"/llm{CHAT}", CHAT):
            assert client.post(path).status_code == 401
            assert client.post(path, headers=bearer("sender")).status_code == 200
        for path in ("/llm/sleep", "/llmhealth", "/llm/llm/health"):
            assert client.get(path, headers=bearer("sender")).status_code == 404
        assert client.get("/llm/health").status_code == 200


def test_the_path_is_the_one_that_the_router_takes() -> None:
    pairs = [("/llm", "/llm/a", "/a"), ("/llm", "/llm", ""), ("/llm", "/llma", "/llma"), ("", "/a", "/a")]
    for root, path, below in pairs:
        assert path_in({"path": path, "root_path": root}) == below


def test_a_tenant_is_asked_for_where_the_model_is_and_where_nobody_knows() -> None:
    for path in (CHAT, "/v1/models", "/tokenize", "/inference/v1/generate", "/no/such/path", ""):
        assert is_for_tenants(path)
    for path in ("/metrics", "/docs", POLICY, "/health", "/version"):
        assert not is_for_tenants(path)


class TestKeys:
    def test_new_keys_differ_and_are_known_by_their_digest_alone(self) -> None:
        keys = {new_key() for _ in range(100)}
        assert len(keys) == 100
        assert all(len(key) >= 43 for key in keys)
        key = keys.pop()
        assert digest_of(key) == hashlib.sha256(key.encode()).hexdigest()
        holder = Holder(digest_of(key), frozenset({KeyScope.INFER}))
        assert KeyRing([holder]).holder_of(key) is holder
        assert KeyRing([holder]).holder_of(digest_of(key)) is None
        assert holder.digest not in repr(holder)

    def test_the_empty_key_is_nobodys(self) -> None:
        ring = KeyRing([Holder(digest_of(""), frozenset(KeyScope))])
        assert ring.holder_of("") is None

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ('{"keys": [%(a)s, %(a2)s]}', "two keys are told by the key"),
            ('{"keys": [%(a)s, %(b_named_a)s]}', "two keys are named 'a'"),
            ('{"inference": "open", "keys": [%(a)s]}', "'inference' is open, and there are keys for it"),
        ],
    )
    def test_what_cannot_be_is_refused(self, content: str, words: str) -> None:
        def entry(name: str, digit: str) -> str:
            return f'{{"name": "{name}", "key_sha256": "{digit * 64}", "scopes": ["infer"]}}'

        entries = {"a": entry("a", "1"), "a2": entry("a2", "1"), "b_named_a": entry("a", "2")}
        access = Access.model_validate_json(content % entries)
        with pytest.raises(ValueError, match=words):
            access.require_sound(())

    def test_a_key_has_one_entry_and_its_sender_a_policy(self) -> None:
        tenant = Tenant(name="t", key_sha256="1" * 64, policy="p")
        for digit, scope, words in (("1", "observe", "also a tenant's"), ("2", "infer", "is no tenant's")):
            entry = f'{{"name": "a", "key_sha256": "{digit * 64}", "scopes": ["{scope}"]}}'
            with pytest.raises(ValueError, match=words):
                Access.model_validate_json(f'{{"keys": [{entry}]}}').require_sound([tenant])
        with pytest.raises(ValueError, match="'inference' is open"):
            Access.model_validate_json('{"inference": "open"}').require_sound([tenant])

    @pytest.mark.parametrize(
        "entry",
        [
            '{"name": "a", "key_sha256": "short", "scopes": ["infer"]}',
            '{"name": "a", "key_sha256": "%s", "scopes": []}' % ("1" * 64),
            '{"name": "a", "key_sha256": "%s", "scopes": ["root"]}' % ("1" * 64),
            '{"name": "a", "key_sha256": "%s", "scopes": ["infer", "infer"]}' % ("1" * 64),
            '{"name": "a", "key": "secret", "scopes": ["infer"]}',
        ],
    )
    def test_an_entry_is_strict(self, entry: str) -> None:
        with pytest.raises(ValidationError):
            Access.model_validate_json(f'{{"keys": [{entry}]}}')


class TestWhereItListens:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"])
    def test_here(self, host: str) -> None:
        assert is_local(host)
        require_keys(Access(), KeyRing(), host=host)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", None, "10.0.0.1", "example.org", "127.0.0.1.example.org"])  # noqa: S104
    def test_elsewhere_only_with_keys_or_if_the_file_says_so(self, host: str | None) -> None:
        assert not is_local(host)
        with pytest.raises(AccessError, match="telltale key new"):
            require_keys(Access(), OPEN_RING, host=host)
        require_keys(Access(), RING, host=host)
        require_keys(Access.model_validate_json('{"inference": "open"}'), KeyRing(), host=host)
        require_keys(Access(), KeyRing(), host=host, uds="/run/telltale.sock")

    def test_who_says_keyed_has_keys(self) -> None:
        access = Access.model_validate_json('{"inference": "keyed"}')
        with pytest.raises(AccessError, match="there is no key for it"):
            require_keys(access, KeyRing(), host="127.0.0.1")
        require_keys(access, RING, host="127.0.0.1")


def test_every_need_has_scopes_and_closed_has_none() -> None:
    assert not Need.CLOSED.scopes
    assert all(need.scopes for need in Need if need is not Need.CLOSED)
    assert need_of("POST", "/no/such/path") is None
