"""Which attempt at an answer a request is, and what a rule that acts behind the engine does to it. Plain data."""

from __future__ import annotations

from enum import StrEnum

from monitor.types import Action

DEFERRED = frozenset({Action.ESCALATE, Action.ROUTE, Action.REGENERATE})
"""Actions that the API process carries out while it withholds the reply."""


class Attempt(StrEnum):
    """Who waits for a request's reply, and for which time."""

    UNHELD = "unheld"
    """Nobody withholds the reply: what cannot be carried out any more is a block."""
    FIRST = "first"
    """The API process withholds it and does what is decided."""
    SECOND = "second"
    """Likewise, after a rule has had the request answered anew. It is not answered a third time."""


class Holds(StrEnum):
    """How long a reply is withheld because of a rule."""

    NOTHING = "nothing"
    PROMPT = "prompt"
    """Until the prompt has been judged, and longer only if the rule has fired."""
    REPLY = "reply"
    """Until it has ended."""

    @property
    def rank(self) -> int:
        """Higher is longer."""
        return tuple(Holds).index(self)
