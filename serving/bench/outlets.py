"""What it costs to write down and to tell: a server that does all of it against the same one that does nothing of it.

Both are monitored. One has an audit trail (every event on disk before its response leaves), sends every event to a
webhook and is scraped, every second unless said otherwise; the other one has none of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from monitor.audit.key import read_key
from monitor.audit.store import open_store
from monitor.audit.verify import verify
from monitor.events import Decision
from probes.modelref import read_model_ref
from serving.arguments import value_of
from serving.bench import BenchError
from serving.bench.coverage import Seen, read_seen, require_seen
from serving.bench.detectors import write_monitored
from serving.bench.load import Sample, Workload, measure_steady
from serving.bench.servers import Program, Server, running
from serving.bench.session import Subject
from serving.engine.launch import server_environment

_SECRET = "TELLTALE_BENCH_SECRET"  # noqa: S105 - the name of a variable
SCRAPE_SECONDS = 1.0
"""Fifteen times as often as Prometheus does unless told: what a scrape costs shows."""
_TELL_SECONDS = 30.0
_EMPTY = Seen(0, 0, 0, 0, 0)
_PROOFS = 1
"""Requests by which a server proves at its start that it sees; they are decided and told like any other."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Both servers, one after the other.

    Attributes:
        silent_first: the order.
        silent, telling: what was measured.
    """

    silent_first: bool
    silent: Sample
    telling: Sample


@dataclass(frozen=True, slots=True)
class Told:
    """What the telling server wrote down and told.

    Attributes:
        requests: that it answered; one of them is its own, by which it proves at the start that it sees.
        events: decisions in its audit trail, whose chain holds.
        messages: that its webhook took.
        scrapes: of its metrics.
    """

    requests: int
    events: int
    messages: int
    scrapes: int


def measure_outlets(
    subject: Subject,
    work: Path,
    workload: Workload,
    *,
    rounds: int,
    progress: Callable[[str], None],
    scrape_seconds: float = SCRAPE_SECONDS,
) -> tuple[tuple[Pair, ...], Told]:
    """Start both servers, and measure them in turns; the first round does not count.

    Args:
        subject: what both serve.
        work: an empty folder.
        workload: of one turn; its steady part is used.
        rounds: that count.
        progress: told what happens.
        scrape_seconds: of the telling server's turns, between two scrapes.
    Raises:
        probes.errors.TelltaleError: a server failed, the monitor did not see everything, or events are missing.
    """
    reference = read_model_ref(subject.folder, model_id=subject.model_id, dtype="float32")
    vocabulary = int(json.loads((subject.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    with _receiving() as (address, taken), contextlib.ExitStack() as stack:
        servers: list[Server] = []
        for name in ("silent", "telling"):
            folder = work / name
            folder.mkdir()
            policy = write_monitored(folder, reference, model_id=subject.model, layers=subject.layers)
            if name == "telling":
                _let_tell(policy, address)
            command = [sys.executable, "-m", "serving.cli", "serve", "--policy", str(policy), *subject.flags]
            environment = server_environment() | dict(os.environ) | {_SECRET: "whsec_" + "A" * 43 + "="}
            progress(f"starting the {name} server")
            servers.append(stack.enter_context(running(Program(name, command, environment, "/ready"), folder)))
            servers[-1].pause()
        silent, telling = servers
        model = _name_of(subject)
        turns = _Turns(silent, telling, workload, model=model, vocabulary=vocabulary, scrape_seconds=scrape_seconds)
        turns.both(0)
        pairs = []
        for number in range(1, rounds + 1):
            pairs.append(turns.both(number))
            ratio = pairs[-1].telling.throughput / pairs[-1].silent.throughput
            progress(f"round {number}: throughput x{ratio:.3f}")
        telling.resume()
        turns.require_delivered(taken)
    return tuple(pairs), _require_told(work / "telling", turns, len(taken))


class _Turns:
    """Measures one server while the other one is stopped."""

    def __init__(
        self,
        silent: Server,
        telling: Server,
        workload: Workload,
        *,
        model: str,
        vocabulary: int,
        scrape_seconds: float,
    ) -> None:
        self._servers = (silent, telling)
        self._workload = workload
        self._model = model
        self._vocabulary = vocabulary
        self._seen: dict[str, Seen] = {}
        self._scrape_seconds = self._until_scrape = scrape_seconds
        self.requests = 0
        self.scrapes = 0

    def both(self, number: int) -> Pair:
        """One round; who begins alternates."""
        order = self._servers if number % 2 == 0 else self._servers[::-1]
        samples = {server.name: self._turn(server, number) for server in order}
        return Pair(number % 2 == 0, samples["silent"], samples["telling"])

    def require_delivered(self, taken: Collection[str]) -> None:
        """Wait until the webhook has taken as many messages as there were requests, with that of the start.

        Raises:
            BenchError: it has not.
        """
        waited = threading.Event()
        for _ in range(int(_TELL_SECONDS * 10)):
            if len(taken) >= self.requests + _PROOFS:
                return
            waited.wait(0.1)
        sent = self.requests + _PROOFS
        raise BenchError(f"{sent} requests were answered, and {len(taken)} messages were delivered.")

    def _turn(self, server: Server, number: int) -> Sample:
        server.resume()
        telling = server is self._servers[1]
        before = self._seen.get(server.name) or read_seen(server.url) or _EMPTY
        try:
            with self._scraping(server) if telling else contextlib.nullcontext():
                sample = measure_steady(
                    server.url, self._model, self._workload, salt=f"round-{number}", vocabulary=self._vocabulary
                )
            self._seen[server.name] = require_seen(
                server.url, before, requests=sample.requests, positions=sample.positions
            )
        except httpx.HTTPError as error:
            raise server.failure(f"did not answer ({type(error).__name__}: {error})") from error
        self.requests += sample.requests if telling else 0
        server.pause()
        return sample

    @contextlib.contextmanager
    def _scraping(self, server: Server) -> Iterator[None]:
        """Read the server's metrics as Prometheus would."""
        ended = threading.Event()

        def run() -> None:
            # The time between two scrapes is that of the server's turns: turns may be shorter than it.
            with httpx.Client(trust_env=False, timeout=30.0) as client:
                while True:
                    began = time.monotonic()
                    if ended.wait(self._until_scrape):
                        self._until_scrape = max(self._until_scrape - (time.monotonic() - began), 0.0)
                        return
                    client.get(f"{server.url}/metrics").raise_for_status()
                    self.scrapes += 1
                    self._until_scrape = self._scrape_seconds

        thread = threading.Thread(target=run, name="telltale-bench-scraper", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _name_of(subject: Subject) -> str:
    served = value_of("--served-model-name", subject.flags)
    if served is None:
        raise BenchError(f"the flags {' '.join(subject.flags)} lack --served-model-name, which is needed.")
    return served


def _let_tell(policy: Path, address: str) -> None:
    """Add an audit trail and a sink that gets every event."""
    content = json.loads(policy.read_text(encoding="utf-8"))
    content["audit"] = {"url": "sqlite:///trail.db", "text": "full", "durability": "before_release"}
    sink = {"name": "all", "kind": "webhook", "url": address, "secret_env": _SECRET, "min_action": "allow"}
    content["sinks"] = [sink]
    policy.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _require_told(folder: Path, turns: _Turns, messages: int) -> Told:
    store = open_store(f"sqlite:///{folder / 'trail.db'}")
    events = sum(isinstance(one.event, Decision) for writer in store.writers() for one in store.read(writer))
    proof = verify(store, [read_key(folder / "audit.key")])
    store.close()
    told = Told(turns.requests + _PROOFS, events, messages, turns.scrapes)
    if not proof.holds or (told.events, told.messages) != (told.requests, told.requests):
        raise BenchError(
            f"{told.requests} requests were answered; {told.events} have an event, {told.messages} were told to the "
            f"webhook, and the trail {'holds' if proof.holds else 'does not hold'}. The benchmark is void."
        )
    return told


@contextlib.contextmanager
def _receiving() -> Iterator[tuple[str, set[str]]]:
    """A webhook on this machine, and the ids of what it took: what was sent twice counts once."""
    taken: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            taken.add(self.headers["webhook-id"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="telltale-bench-webhook", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", taken
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
