"""Durations as they stand in a policy file: a whole number with its unit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Duration = Annotated[
    str, Field(pattern=r"^[0-9]{1,6}(ms|s|m|h)$", description="a whole number with its unit: 500ms, 60s, 5m, 1h")
]
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(duration: str) -> float:
    """A ``Duration`` in seconds."""
    unit = duration.lstrip("0123456789")
    return int(duration.removesuffix(unit)) * _SECONDS[unit]
