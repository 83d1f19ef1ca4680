"""Settings of vLLM's HTTP server that open routes around the monitor: the server does not start with them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from probes.errors import TelltaleError

OPENING: Mapping[str, str] = {
    "--enable-scale-out": (
        "/inference/v1/generate would take raw sampling parameters, and /inference/v1/abort_requests would end "
        "anybody's request"
    ),
    "--tokens-only": "it serves the same routes as --enable-scale-out",
}
"""By the flag, what it would open."""


class OpenRouteError(TelltaleError, RuntimeError):
    """A setting would open a route whose requests nobody has judged."""


def refuse_open_routes(args: Namespace) -> None:
    """Refuse them whether they come from the command line or from a configuration file of vLLM's.

    Args:
        args: of vLLM's server.
    Raises:
        OpenRouteError: names the flag and says why.
    """
    for flag, why in OPENING.items():
        if getattr(args, flag.removeprefix("--").replace("-", "_"), False):
            raise OpenRouteError(f"{flag} is refused on a monitored server: {why}. Leave it out.")
