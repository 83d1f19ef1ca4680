"""Which tokens of a request are kept when activations are collected. Knows no engine."""

from __future__ import annotations

import numpy as np

from monitor.segments import Codes
from monitor.types import Role
from probes.errors import TelltaleError
from probes.fit.reading.activation_manifest import TokenPositions

UNKNOWN_ROLE = 255
"""Role code of a token of which nobody can say who wrote it."""


class KeptTokensError(TelltaleError, ValueError):
    """A request has none of the tokens that are to be kept."""


def needs_response(positions: TokenPositions) -> bool:
    """Whether replies are computed at all."""
    return positions in {TokenPositions.RESPONSE, TokenPositions.ALL}


def kept_tokens(positions: TokenPositions, prompt: Codes | None, *, num_prompt: int, num_tokens: int) -> range:
    """The places of the tokens that are kept; they always lie side by side.

    Args:
        positions: which ones.
        prompt: (num_prompt,) role codes; None if they are unknown.
        num_prompt: tokens of the prompt, at least 1.
        num_tokens: tokens of prompt and reply.
    Returns: at least one place.
    Raises:
        KeptTokensError: there is no such token.
    """
    match positions:
        case TokenPositions.LAST:
            return range(num_prompt - 1, num_prompt)
        case TokenPositions.PROMPT:
            return range(num_prompt)
        case TokenPositions.ALL:
            return range(num_tokens)
        case TokenPositions.RESPONSE:
            if num_tokens == num_prompt:
                raise KeptTokensError("has no reply, and --positions response keeps nothing else.")
            return range(num_prompt, num_tokens)
        case TokenPositions.TEMPLATE:
            if prompt is None:
                raise KeptTokensError(
                    "its tokens could not be told apart, so that nobody knows where the template's begin. Use "
                    "--positions last."
                )
            first = int(np.flatnonzero(np.append(True, prompt != Role.TEMPLATE.code))[-1])
            if first == num_prompt:
                raise KeptTokensError(
                    "no token of the chat template stands behind its last message. Use --positions last."
                )
            return range(first, num_prompt)
