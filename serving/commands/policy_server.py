"""``telltale policy reload | history | rollback``: thin clients of a running server's routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from monitor.yaml_file import read_policy_text
from probes.errors import TelltaleError

EXIT_FAILED = 1
_SECONDS = 360.0
_SHOWN = ("number", "time", "source", "outcome", "digest", "message")


class ServerError(TelltaleError, RuntimeError):
    """A server does not answer as one of ours that may be asked."""


def reload(file: Path | None, *, server: str, key: str) -> None:
    """Put a policy in force.

    Args:
        file: to send; None has the server read its own again.
        server: its address.
        key: an API key.
    Raises:
        ServerError: it does not answer, or the key may not do this.
        monitor.yaml_file.PolicyError: the file cannot be read.
        typer.Exit: code 1 if the policy was not put in force.
    """
    if file is None:
        _say(_call(server, key, "POST", "/policy/reload"))
    else:
        _say(_call(server, key, "PUT", "/policy", content=read_policy_text(file).encode()))


def history(*, server: str, key: str) -> None:
    """List what the server was given.

    Raises:
        ServerError: it does not answer, or the key may not do this.
    """
    table = Table()
    for column in _SHOWN:
        table.add_column(column, overflow="fold")
    for entry in _call(server, key, "GET", "/policy/history")["history"]:
        shown = {**entry, "digest": (entry["digest"] or "")[:12], "time": entry["time"][:19]}
        table.add_row(*(str(shown.get(key, "")) for key in _SHOWN))
    Console().print(table)


def rollback(to: int | None, *, server: str, key: str) -> None:
    """Put in force again what was in force before.

    Args:
        to: number in the history; None for what ran before.
        server: its address.
        key: an API key.
    Raises:
        ServerError: it does not answer, the key may not do this, or there is no such entry.
        typer.Exit: code 1 if the policy was not put in force.
    """
    _say(_call(server, key, "POST", "/policy/rollback", json={"to": to}))


def _call(server: str, key: str, method: str, path: str, **body: Any) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"{server.rstrip('/')}/telltale/v1{path}"
    try:
        answer = httpx.request(method, url, headers=headers, timeout=_SECONDS, follow_redirects=False, **body)
        content: dict[str, Any] = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"{server}: does not answer ({error}). Pass its address by --server.") from error
    except ValueError as error:
        raise ServerError(f"{server}: answers {answer.status_code}, and no JSON. Is this a telltale server?") from error
    if "outcome" in content or "history" in content:
        return content
    said = content.get("detail") or content.get("error", {}).get("message") or content
    raise ServerError(f"{server}: answers {answer.status_code}: {said}")


def _say(entry: dict[str, Any]) -> None:
    digest = f", plan {entry['digest'][:12]}" if entry["digest"] else ""
    typer.echo(f"{entry['outcome']} (number {entry['number']}{digest}, {entry['seconds']} s)")
    if "message" in entry:
        typer.echo(entry["message"])
    if entry["outcome"] not in {"applied", "unchanged"}:
        raise typer.Exit(EXIT_FAILED)
