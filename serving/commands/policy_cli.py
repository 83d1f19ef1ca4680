"""``telltale policy``: compare policies, try them on what was recorded, and say what a running server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

policy_app = typer.Typer(
    help="Compare and try policies; put one in force on a running server, and go back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_Server = Annotated[str, typer.Option("--server", help="The server's address.")]
_Key = Annotated[
    str, typer.Option("--key", envvar="TELLTALE_API_KEY", help="An API key that may do this; better by the variable.")
]
_HERE = "http://127.0.0.1:8000"


@policy_app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="Policy file that runs.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="Policy file that is to run.", show_default=False)],
) -> None:
    """Say in words what changes, and whether a running server can take it over."""
    from serving.commands.policy_diff import diff as run

    run(old, new)


@policy_app.command()
def test(
    file: Annotated[Path, typer.Argument(help="Policy file.", show_default=False)],
    cases: Annotated[Path, typer.Option(help="Recorded scores and expected actions (YAML).", show_default=False)],
) -> None:
    """Let a policy judge recorded scores. Exit code 1, and what differs, where it does not do what is expected."""
    from serving.commands.policy_test import test as run

    run(file, cases)


@policy_app.command()
def reload(
    file: Annotated[
        Path | None, typer.Argument(help="Policy file to send; left out: the server reads its own again.")
    ] = None,
    server: _Server = _HERE,
    key: _Key = "",
) -> None:
    """Put a policy in force on a running server. Exit code 1, and why, where it is not."""
    from serving.commands.policy_server import reload as run

    run(file, server=server, key=key)


@policy_app.command()
def history(server: _Server = _HERE, key: _Key = "") -> None:
    """List what a running server was given, the newest first."""
    from serving.commands.policy_server import history as run

    run(server=server, key=key)


@policy_app.command()
def rollback(
    to: Annotated[int | None, typer.Option(help="Number in the history; what ran before, if left out.")] = None,
    server: _Server = _HERE,
    key: _Key = "",
) -> None:
    """Put in force again what was in force before."""
    from serving.commands.policy_server import rollback as run

    run(to, server=server, key=key)


@policy_app.command()
def simulate(
    policy: Annotated[Path, typer.Argument(help="The policy file that is tried.", show_default=False)],
    *,
    source: Annotated[
        str | None, typer.Option("--from", help="URL of an audit trail; that of the policy file if left out.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Begin of the period: a time (2026-11-23T08:00) or so long ago (24h, 7d).")
    ] = None,
    until: Annotated[str | None, typer.Option(help="End of the period, likewise; now if left out.")] = None,
    only: Annotated[
        str | None, typer.Option("--policy", help="Try this policy on all requests, whichever they had.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Say what a policy would have done over a recorded period, from the statistics in an audit trail."""
    from serving.commands.policy_simulate import simulate as run

    run(policy, source=source, since=since, until=until, only=only, as_json=as_json)
