"""A server whose policy file knows no key: over TLS, on every address, with a key from the environment alone."""

from __future__ import annotations

import datetime
import ipaddress
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serving.api.admin_key import FILE
from serving.api.keyring import digest_of
from tests.engine.red_team import command_lines
from tests.support.server import Server, starting, telltale_command, wait_for
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KEY = "sk-from-the-environment-123"


def self_made(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "telltale test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=12))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


class Secured(NamedTuple):
    """A server over TLS, what it takes to trust it, and its administrator's key."""

    server: Server
    trust: ssl.SSLContext
    admin: str

    def get(self, path: str, key: str | None = None, method: str = "GET") -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        return httpx.request(method, f"{self.server.url}{path}", headers=headers, verify=self.trust, timeout=60)


@pytest.fixture(scope="module")
def secured(tiny: TinyModel, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    own = tmp_path_factory.mktemp("secured")
    certificate, key = self_made(own)
    flags = ("--host", "0.0.0.0", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))  # noqa: S104
    command = telltale_command(tiny.path, folder / "guarded.yaml", *flags)
    trust = ssl.create_default_context(cafile=str(certificate))
    with starting(command, own / "server.log", environment={"VLLM_API_KEY": KEY}) as plain:
        server = Server(plain.url.replace("http:", "https:"), plain.process, plain.log)
        wait_for(server, trust=trust)
        found = re.findall(r"administrator's key, .*: (tt-\S+)", server.log.read_text())
        assert len(found) == 1
        yield Secured(server, trust, found[0])


def test_https_is_served_and_http_is_not(secured: Secured) -> None:
    assert secured.get("/health").status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(secured.server.url.replace("https:", "http:") + "/health", timeout=10)
    with pytest.raises(httpx.ConnectError):
        httpx.get(secured.server.url + "/health", timeout=10)  # to whom the certificate says nothing


def test_the_environments_key_reaches_the_model_and_no_other_does(secured: Secured) -> None:
    def client(key: str) -> openai.OpenAI:
        with_tls = httpx.Client(verify=secured.trust)
        return openai.OpenAI(base_url=f"{secured.server.url}/v1", api_key=key, max_retries=0, http_client=with_tls)

    answer = client(KEY).completions.create(model="tiny", prompt="One two", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    for key, error in (("none", openai.AuthenticationError), (secured.admin, openai.PermissionDeniedError)):
        with pytest.raises(error):
            client(key).completions.create(model="tiny", prompt="One two", max_tokens=2)
    for path in ("/v1/models", "/tokenize", "/invocations", "/version"):
        assert secured.get(path).status_code == 401


def test_where_others_reach_it_nothing_is_open_but_health(secured: Secured) -> None:
    for path in ("/metrics", "/docs", "/redoc", "/openapi.json", "/load", "/telltale/v1/policy"):
        assert secured.get(path).status_code == 401
        assert secured.get(path, KEY).status_code == 403
        assert secured.get(path, secured.admin).status_code in {200, 404}
    assert secured.get("/metrics", secured.admin).status_code == 200
    assert secured.get("/openapi.json", secured.admin).status_code == 200
    for path in ("/health", "/ready", "/ping"):
        assert secured.get(path).status_code == 200


def test_the_administrators_key_is_shown_once_and_kept_as_a_digest(secured: Secured) -> None:
    kept = secured.server.log.parent / "state" / FILE
    assert kept.read_text().strip() == digest_of(secured.admin)
    assert kept.stat().st_mode & 0o777 == 0o600
    log = secured.server.log.read_text()
    assert log.count(secured.admin) == 1
    listed = command_lines(secured.server)
    metrics = secured.get("/metrics", secured.admin).text
    for secret in (KEY, digest_of(KEY), digest_of(secured.admin)):
        assert secret not in log + listed + metrics
    assert secured.admin not in listed + metrics
