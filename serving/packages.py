"""Are the packages that will be imported ours? Top-level names as plain as these are easily shadowed by a folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

OURS = ("dashboards", "monitor", "probes", "serving")


def shadowed_packages() -> str | None:
    """What is wrong with where our packages come from, or None. Imports none of them."""
    home = Path(__file__).resolve().parent.parent
    for name in OURS:
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent if spec is not None and spec.origin is not None else None
        if found != home / name:
            return (
                f"the package {name!r} comes from {found or 'nowhere'}, not from {home / name}: a folder of that name "
                "shadows it. Start telltale from another directory, or take that folder off PYTHONPATH."
            )
    return None
