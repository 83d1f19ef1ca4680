"""``telltale doctor --compat``."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from serving.cli import EXIT_FAILED
from serving.engine.compat import SUPPORTED, installed_version, require_version, touchpoints


def show_compat() -> None:
    """List every function of vLLM that we wrap or override, and whether it is the one that was read.

    Raises:
        serving.engine.compat.CompatError: vLLM is missing or outside the supported range.
    """
    require_version()
    name, version = installed_version()
    table = Table(title=f"{name} {version}; supported {SUPPORTED}", title_justify="left")
    for column in ("function", "use", "read", "installed", ""):
        table.add_column(column, overflow="fold")
    changed = 0
    points = touchpoints()
    for point in points:
        found = point.found()
        changed += found != point.sha256
        verdict = "same" if found == point.sha256 else "CHANGED"
        table.add_row(f"{point.module}.{point.name}", point.use, point.sha256, found, verdict)
    console = Console(width=180)
    console.print(table)
    console.print(f"{len(points)} functions, {changed} changed")
    if changed:
        sys.exit(EXIT_FAILED)
