"""What may go wrong with a sink."""

from __future__ import annotations

from probes.errors import TelltaleError


class SinkError(TelltaleError, ValueError):
    """A sink cannot be used as it is described, or what it left behind cannot be read."""
