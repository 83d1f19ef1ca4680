"""``telltale policy diff``."""

from __future__ import annotations

from pathlib import Path

import typer

from monitor.yaml_file import read_policy_file
from serving.changes import differences, restarts
from serving.deployment import check_policy


def diff(old: Path, new: Path) -> None:
    """Say what changes from one policy file to another.

    Raises:
        probes.errors.TelltaleError: one of them is wrong.
    """
    before, after = check_policy(old), check_policy(new)
    found = differences(before, after)
    for item in found:
        typer.echo(f"{item.change.value} {item.what}: {item.said}")
    needed = restarts(read_policy_file(old).config, read_policy_file(new).config, before, after)
    for line in needed:
        typer.echo(f"restart needed: {line}")
    if not found and not needed:
        typer.echo("nothing that a request would notice")
    elif not needed:
        typer.echo("a server that was started with the old file can take this over while it runs")
