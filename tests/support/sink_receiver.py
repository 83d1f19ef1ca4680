"""A receiver of webhooks that does what it is told: takes them, fails, hangs, redirects, breaks off."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG, BREAK, CUT, LONG = "hang", "break", "cut", "long"
LONG_BYTES = 50_000_000
Answer = int | str | tuple[int, dict[str, str]]


@dataclass(frozen=True)
class Got:
    """A request that arrived."""

    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def content(self) -> Any:
        return json.loads(self.body)


@dataclass
class Receiver:
    """A running receiver: answers one request after the other as ``answers`` say, then with 200."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    got: list[Got] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, got: Got) -> Answer:
        with self._changed:
            self.got.append(got)
            self._changed.notify_all()
            return self.answers.pop(0) if self.answers else 200

    def wait_for(self, count: int, seconds: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.got) >= count, seconds), f"{len(self.got)} of {count}"


@contextmanager
def receiving(answers: Sequence[Answer] = ()) -> Iterator[Receiver]:
    """A receiver on a free port of this machine, until the block ends."""
    receiver = Receiver(answers=list(answers))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(receiver))
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(receiver: Receiver) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = receiver.take(Got(self.path, headers, body, self.client_address[1]))
            if answer == HANG:
                receiver.released.wait(30)
                self.close_connection = True
                return
            if answer == BREAK:
                self.close_connection = True
                return
            if answer in (CUT, LONG):
                self.send_response(200)
                self.send_header("content-length", str(LONG_BYTES))
                self.end_headers()
                self.close_connection = True
                if answer == LONG:
                    self._send_long()
                return
            status, extra = answer if isinstance(answer, tuple) else (int(answer), {})
            self.send_response(status)
            for name, value in extra.items():
                self.send_header(name, value)
            self.send_header("content-length", "0")
            self.end_headers()

        def _send_long(self) -> None:
            try:
                self.wfile.write(b"." * LONG_BYTES)
            except OSError:
                return  # the sender had enough

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
