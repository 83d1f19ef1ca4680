"""A running server, asked whatever its OpenAPI document allows and what it does not: no 5xx, no hang, no end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.api.keyring import digest_of, new_key
from tests.engine.conftest import GUARDED
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.fuzz]

EXAMPLES = "25"
HANG_SECONDS = "60"
KEY = new_key()
ACCESS = f"""\
access:
  metrics: open
  keys: [{{name: fuzzer, key_sha256: "{digest_of(KEY)}", scopes: [infer, observe, admin]}}]
"""
# vLLM answers 501 there with a model that is not made for it, and says so: its OpenAPI document lists that status.
SETTINGS = """\
[[operations]]
include-path = "/v1/systemone"
checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 501]
"""


@pytest.fixture(scope="module")
def server(tiny: TinyModel, folder: Path) -> Iterator[Server]:
    (folder / "fuzzed.yaml").write_text(GUARDED + ACCESS)
    # Most requests that hold are answered until the context is full: it is short, so that many can be asked.
    command = telltale_command(tiny.path, folder / "fuzzed.yaml", "--max-model-len", "128")
    with serving(command, folder / "fuzzed.log") as started:
        yield started


@pytest.mark.timeout(1200)
def test_nothing_that_is_asked_is_a_server_error(server: Server, tmp_path: Path) -> None:
    settings = tmp_path / "schemathesis.toml"
    settings.write_text(SETTINGS)
    before = httpx.get(f"{server.url}/metrics").text
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(settings),
            "run", f"{server.url}/openapi.json",
            "--checks", "not_a_server_error", "--max-examples", EXAMPLES, "--request-timeout", HANG_SECONDS,
            "--phases", "examples,coverage,fuzzing", "--seed", "7", "--continue-on-failure", "--warnings", "off",
            "--header", f"Authorization: Bearer {KEY}",
        ],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:]
    assert httpx.get(f"{server.url}/ready").status_code == 200
    after = httpx.get(f"{server.url}/metrics").text
    assert _gaps(after) == _gaps(before)


def _gaps(metrics: str) -> list[str]:
    return [
        line
        for line in metrics.splitlines()
        if line.startswith("telltale_tokens_skipped_total") and "final" not in line and "sink" not in line
    ]
