"""``telltale top`` as the command line knows it."""

from __future__ import annotations

from typing import Annotated

import typer


def top(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    key_env: Annotated[str, typer.Option(help="Environment variable with an API key.")] = "TELLTALE_API_KEY",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds from one reading to the next.")] = 2.0,
    *,
    once: Annotated[bool, typer.Option("--once", help="Print the tables once and leave.")] = False,
) -> None:
    """Show what a running server sees: detectors, rules, coverage, canary, throughput."""
    from serving.commands.top import top as run

    run(url=url, key_env=key_env, every=every, once=once)
