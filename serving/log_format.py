"""How logs are written. Light: the command line imports it."""

from __future__ import annotations

from enum import StrEnum


class LogFormat(StrEnum):
    """How logs are written."""

    TEXT = "text"
    """For people."""
    JSON = "json"
    """One object a line."""
