"""Where a request came from: which kind of route. Set by our middleware, read where the request is signed."""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass

from probes.card import Format


@dataclass(frozen=True, slots=True)
class Origin:
    """The route of a request.

    Attributes:
        fmt: whether its text goes through the chat template.
    """

    fmt: Format = Format.RAW


_NOBODY_SAID = Origin()
_CURRENT: ContextVar[Origin] = ContextVar("telltale_origin", default=_NOBODY_SAID)


def current_origin() -> Origin:
    """The origin of the request that this task serves; raw where nobody said."""
    return _CURRENT.get()


def enter_origin(origin: Origin) -> Token[Origin]:
    """Say where the request of this task comes from."""
    return _CURRENT.set(origin)


def leave_origin(token: Token[Origin]) -> None:
    """Undo ``enter_origin``."""
    _CURRENT.reset(token)
