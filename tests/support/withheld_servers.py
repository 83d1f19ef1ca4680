"""What rules that escalate or route turn to, on this machine: a classifier and an upstream that fail on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_SECONDS = 6.0
UPSTREAM_TEXT = "From far away."


@dataclass
class Outside:
    """A running server, and what it was asked.

    Attributes:
        url: its address.
        asked: path, headers and JSON of each request.
    """

    url: str
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)


@contextmanager
def outside() -> Iterator[Outside]:
    """Run it until the block ends."""
    found = Outside("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            found.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            match self.path.split("/")[1:]:
                case ["flagged" | "clean" as answer]:
                    self._json({"flagged": answer == "flagged"})
                case ["garbage"]:
                    self._say(200, b"<html>yes</html>")
                case ["truthy"]:
                    self._json({"flagged": "yes"})
                case ["redirect"]:
                    self._say(307, b"", location=f"{found.url}/clean")
                case ["huge"]:
                    self._say(200, b'{"flagged": false, "why": "' + b"x" * 200_000 + b'"}')
                case ["slow"]:
                    time.sleep(SLOW_SECONDS)
                    self._json({"flagged": False})
                case ["up", "v1", "chat", "completions"] if body.get("stream"):
                    self._stream(body)
                case ["up", "v1", "chat", "completions"]:
                    message = {"role": "assistant", "content": UPSTREAM_TEXT}
                    self._json({"model": body["model"], "choices": [{"index": 0, "message": message}]})
                case _:
                    self._say(500, b"no")

        def _json(self, content: dict[str, Any]) -> None:
            self._say(200, json.dumps(content).encode())

        def _stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for word in UPSTREAM_TEXT.split():
                chunk = {"model": body["model"], "choices": [{"index": 0, "delta": {"content": f"{word} "}}]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")

        def _say(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                return  # whoever asked had enough

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
