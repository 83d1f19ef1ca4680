"""A real Prometheus, a real Alertmanager and a receiver of webhooks, for the length of a test."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from ruamel.yaml import YAML

from tests.support.server import free_port, stop

START_SECONDS = 60.0


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression gives now."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def firing(self) -> set[str]:
        """Alerts that fire now."""
        answer = httpx.get(f"{self.url}/api/v1/alerts", timeout=10).json()
        return {alert["labels"]["alertname"] for alert in answer["data"]["alerts"] if alert["state"] == "firing"}


class Receiver:
    """Takes Alertmanager's webhooks."""

    def __init__(self) -> None:
        self.delivered: list[tuple[str, str]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.delivered += [(alert["labels"]["alertname"], alert["status"]) for alert in body["alerts"]]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()


@contextmanager
def prometheus_with(rules: Sequence[str], target: str, receiver: Receiver, folder: Path) -> Iterator[Prometheus]:
    """Scrape a server once a second, evaluate rules as often, deliver what fires.

    Args:
        rules: texts of the rule files.
        target: host and port that is scraped as the job ``telltale``.
        receiver: of the alerts.
        folder: for files and data.
    """
    ports = free_port(), free_port()
    for number, text in enumerate(rules):
        (folder / f"{number}.rules.yaml").write_text(text)
    managers = [{"static_configs": [{"targets": [f"127.0.0.1:{ports[1]}"]}]}]
    scraped = [{"job_name": "telltale", "static_configs": [{"targets": [target]}]}]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["*.rules.yaml"],
        "alerting": {"alertmanagers": managers},
        "scrape_configs": scraped,
    }
    route = {"receiver": "test", "group_by": ["alertname"], "group_wait": "1s", "group_interval": "1s"}
    delivery = {"route": route, "receivers": [{"name": "test", "webhook_configs": [{"url": receiver.url}]}]}
    for name, body in (("prometheus.yml", config), ("alertmanager.yml", delivery)):
        with (folder / name).open("w") as stream:
            YAML().dump(body, stream)
    commands = (
        [
            _program("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{ports[0]}",
        ],
        [
            _program("prometheus-alertmanager"),
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alerts'}",
            f"--web.listen-address=127.0.0.1:{ports[1]}",
            "--cluster.listen-address=",
        ],
    )
    processes = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"{number}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder))
        for port in ports:
            _wait(f"http://127.0.0.1:{port}/-/ready", folder)
        yield Prometheus(f"http://127.0.0.1:{ports[0]}")
    finally:
        for process in processes:
            stop(process)


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is missing: run `make services`"
    return path


def _wait(url: str, folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            if httpx.get(url, timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("*.log"))))
