"""All sinks of a policy file, opened: an outlet for events."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from monitor.events import Content, Event
from monitor.sinks.backoff import Backoff
from monitor.sinks.bound import NOTHING, Bound
from monitor.sinks.dead_letters import DeadLetters
from monitor.sinks.delivery import Delivery
from monitor.sinks.dispatcher import Dispatcher, Observer
from monitor.sinks.errors import SinkError
from monitor.sinks.message import Message, message_of
from monitor.sinks.route import Route
from monitor.sinks.settings import SinkEntry, require_url
from monitor.sinks.signature import parse_secret


def open_delivery(entry: SinkEntry, environment: Mapping[str, str]) -> Delivery:
    """The way to a sink's receiver.

    Args:
        entry: with absolute paths.
        environment: holds the secrets that the entry names.
    Raises:
        SinkError: a variable is missing, or what it holds cannot be used.
    """
    url = entry.url
    if entry.url_env is not None:
        url = _from(environment, entry, "url_env", entry.url_env)
        try:
            require_url(url)
        except ValueError as error:
            raise SinkError(f"sink {entry.name!r}: {entry.url_env}: {error}.") from error
    key = None
    if entry.secret_env is not None:
        secret = _from(environment, entry, "secret_env", entry.secret_env)
        key = parse_secret(secret, where=f"sink {entry.name!r}: {entry.secret_env}")
    ca_file = Path(entry.ca_file) if entry.ca_file is not None else None
    return Delivery(url or "", key, timeout_seconds=entry.timeout_seconds, ca_file=ca_file)


def require_sinks(entries: Sequence[SinkEntry], environment: Mapping[str, str]) -> None:
    """Fail before a model is loaded if a sink cannot be opened; nothing is sent.

    Args:
        entries: with absolute paths.
        environment: holds the secrets that they name.
    Raises:
        SinkError: a variable is missing, what it holds cannot be used, or dead letters could not be kept.
    """
    for entry in entries:
        open_delivery(entry, environment).close()
        folder = Path(entry.dead_letters).parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SinkError(
                f"sink {entry.name!r}: dead letters cannot be kept in {folder}. Make it a folder that can be written, "
                "or name another file in 'dead_letters'."
            )


class Sinks:
    """Sends events to every sink that wants them.

    Args:
        entries: of the policy file, with absolute paths.
        environment: holds their secrets.
        observer: is told what becomes of messages.
        backoff: pauses between attempts.
    Raises:
        SinkError: a sink cannot be opened.
    """

    def __init__(
        self,
        entries: Sequence[SinkEntry],
        environment: Mapping[str, str],
        observer: Observer,
        *,
        backoff: Backoff | None = None,
    ) -> None:
        deliveries = [open_delivery(entry, environment) for entry in entries]
        self._entries = tuple(entries)
        self._routes = {entry.name: Route(entry) for entry in entries}
        self._dispatchers = {
            entry.name: Dispatcher(
                entry.name,
                delivery,
                DeadLetters(Path(entry.dead_letters)),
                observer,
                queue=entry.queue,
                tries=entry.tries,
                backoff=backoff,
            )
            for entry, delivery in zip(entries, deliveries, strict=True)
        }

    def bind(self, bound: Mapping[str, Bound]) -> None:
        """From now on, send too what alerts bind to a sink.

        Args:
            bound: by the sink's name.
        """
        self._routes = {entry.name: Route(entry, bound.get(entry.name, NOTHING)) for entry in self._entries}

    def submit(self, event: Event, content: Callable[[], Content] | None = None) -> None:
        """See ``monitor.outlet.Outlet``; nothing has to wait for it."""
        routes = self._routes
        for entry in self._entries:
            if routes[entry.name].wants(event):
                self._dispatchers[entry.name].offer(_maker(entry, event, content))

    def close(self, timeout: float = 5.0) -> bool:
        """Send what waits, once each, as long as there is time; the rest becomes dead letters.

        Args:
            timeout: seconds for that; as long again for attempts that are being made then.
        Returns: whether all have ended.
        """
        until = time.monotonic() + 2 * timeout
        for dispatcher in self._dispatchers.values():
            dispatcher.end(timeout)
        return all([way.join(max(0.0, until - time.monotonic())) for way in self._dispatchers.values()])


def _maker(entry: SinkEntry, event: Event, content: Callable[[], Content] | None) -> Callable[[], Message]:
    def make() -> Message:
        about = content() if content is not None else None
        return message_of(entry.kind, event, about, text=entry.text)

    return make


def _from(environment: Mapping[str, str], entry: SinkEntry, key: str, name: str) -> str:
    value = environment.get(name, "").strip()
    if not value:
        raise SinkError(f"sink {entry.name!r}: {key} names {name}, which is not set. Set it in the environment.")
    return value
