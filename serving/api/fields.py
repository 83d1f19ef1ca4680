"""Fields of a request's body that no client may set on a monitored server, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NOWHERE = (
    "it hands over what another engine has computed or prepared, and nobody has scored that. A monitored server takes "
    "text and token ids alone"
)
REFUSED: Mapping[str, str] = {
    "use_beam_search": (
        "beam search asks the engine for one token at a time, so that no stream rule would see a reply"
    ),
    "kv_transfer_params": _NOWHERE,
    "ec_transfer_params": _NOWHERE,
    "mm_payload": _NOWHERE,
    "prompt_embeds": "embeddings have no tokens that a verdict could be given on",
}
"""Refused wherever they have a value that is not empty; by name, why."""
PRIORITY = "priority"
"""Lower numbers are served first. Negative ones are kept for the server's own canaries."""


def refused_field(content: Any) -> tuple[str, str] | None:
    """The first field of a body that may not be set.

    Args:
        content: the parsed body.
    Returns: its name and what to say to the client; None if nothing speaks against the body.
    """
    if not isinstance(content, dict):
        return None
    for name, why in REFUSED.items():
        if content.get(name):
            return name, f"{name!r} is refused on a monitored server: {why}. Leave {name!r} out."
    priority = content.get(PRIORITY)
    # A text is what vLLM's own models would turn into a number.
    if isinstance(priority, int | float | str) and _is_negative(priority):
        return PRIORITY, (
            f"{PRIORITY!r} is {priority!r}. Numbers from 0 on are allowed (0 is served first): before them come the "
            "requests by which the server proves that it sees. Leave it out or choose 0 or more."
        )
    return None


def _is_negative(priority: float | str) -> bool:
    try:
        return float(priority) < 0
    except ValueError:  # not a number: vLLM answers that
        return False
