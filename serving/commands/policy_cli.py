"""``telltale policy``: what another policy would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

policy_app = typer.Typer(help="What another policy would do.", no_args_is_help=True, rich_markup_mode=None)


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
