"""Every path of a server, with every key and without: whom it answers, and what it says of its secrets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.api.keyring import digest_of
from tests.engine.red_team import (
    ANSWERED,
    CHAT,
    KEYS,
    MAX_BODY,
    OUTSIDE,
    RAW,
    Caller,
    command_lines,
)
from tests.support.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(red_team: Server) -> Server:
    return red_team


@pytest.fixture(scope="module")
def mallory(server: Server) -> Caller:
    return Caller(server, "mallory")


@pytest.fixture(scope="module")
def watcher(server: Server) -> Caller:
    return Caller(server, "watcher")


class TestEveryPath:
    @pytest.mark.parametrize("path", OUTSIDE)
    def test_has_an_answer_only_for_whom_it_is(self, server: Server, mallory: Caller, path: str) -> None:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
        nobody = Caller(server, None)
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD"):
            assert nobody.send(method, path, json=body).status_code == 401
            stranger = nobody.send(
                method, path, json=body, headers={"authorization": f"Bearer {digest_of(KEYS['admin'])}"}
            )
            assert stranger.status_code == 401
        for method in ("GET", "POST", "PUT"):
            status = mallory.send(method, path, json=body).status_code
            assert status in ({200, 400, 405} if path in ANSWERED else {403, 404}), (method, status)

    def test_no_key_opens_what_is_closed(self, server: Server) -> None:
        for name in set(KEYS) - {"slow"}:
            for path in (
                "/sleep",
                "/collective_rpc",
                "/pause",
                "/scale_elastic_ep",
                "/inference/v1/generate",
                "/server_info",
            ):
                assert Caller(server, name).send("POST", path, json={}).status_code == 404

    def test_an_administrator_sends_no_text(self, server: Server) -> None:
        for name in ("admin", "watcher"):
            assert Caller(server, name).chat("Hi").status_code == 403

    def test_watching_changes_nothing(self, watcher: Caller) -> None:
        for method in ("PUT", "POST", "DELETE", "PATCH"):
            assert watcher.send(method, "/telltale/v1/policy", json={}).status_code == 403

    def test_of_vllm_is_judged(self) -> None:
        """A route that a new version brings is served to nobody until somebody has looked at it; here it is noticed."""
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        from serving.api.paths import need_of

        parser = make_arg_parser(FlexibleArgumentParser())
        routes = set()
        for flags in ([], ["--enable-offline-docs"], ["--enable-fault-tolerance"]):
            app = build_app(parser.parse_args(["--model", "m", *flags]), ("generate",), None)
            routes |= {
                (route.path, method) for route in app.routes for method in getattr(route, "methods", None) or ["GET"]
            }
        unknown = sorted(path for path, method in routes if need_of(method, path.replace("{response_id}", "x")) is None)
        assert len(routes) > 30
        assert unknown == []

    def test_takes_no_body_that_is_too_large(self, server: Server, mallory: Caller) -> None:
        def parts() -> Iterator[bytes]:
            for _ in range(MAX_BODY // 10_000 + 2):
                yield b" " * 10_000

        for content in (b" " * (MAX_BODY + 1), parts()):
            answer = mallory.send("POST", CHAT, content=content, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        fine = b'{"model": "tiny", "prompt": "Hi", "max_tokens": 1' + b" " * (MAX_BODY - 100) + b"}"
        answer = mallory.send("POST", RAW, content=fine, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text

    def test_takes_no_more_than_a_key_may_send(self, server: Server, mallory: Caller) -> None:
        slow = Caller(server, "slow")
        statuses = [slow.raw("Hi", tokens=1) for _ in range(5)]
        assert [answer.status_code for answer in statuses[:3]] == [200] * 3
        refused = statuses[-1]
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert mallory.raw("Hi", tokens=1).status_code == 200


def test_no_secret_is_said_anywhere(server: Server, mallory: Caller, watcher: Caller) -> None:
    """Of all keys and their digests: not in what the server prints, measures, answers, or is called."""
    for path in ("/health", "/v1/models", "/no/such/path", "/docs"):
        for name in KEYS:
            Caller(server, name).send("GET", path)
    Caller(server, None).send("GET", f"/v1/models?key={'x' * 10}", headers={"authorization": "Bearer wrong-key-123"})
    said = "\n".join([
        server.log.read_text(),
        watcher.send("GET", "/metrics").text,
        Caller(server, "admin").send("GET", "/openapi.json").text,
        mallory.send("GET", "/telltale/v1/policy").text,
        command_lines(server),
    ])  # fmt: skip
    assert len(said) > 10_000
    for name, secret in KEYS.items():
        assert secret not in said, name
        assert digest_of(secret) not in said, name
    assert "wrong-key-123" not in said
    assert (server.log.parent / "state").exists() is False, "there is an administrator's key: none is made"
