"""How the API process carries out a rule that regenerates, escalates or routes. Plain data, made from the rule."""

from __future__ import annotations

from dataclasses import dataclass

from monitor.condition import Condition
from monitor.destination import Destination
from monitor.rule import Do, Otherwise
from monitor.types import Action

DEFAULT_TIMEOUT = "10s"


@dataclass(frozen=True, slots=True)
class Handling:
    """What is done once a rule has fired, and what if that fails.

    Attributes:
        do: as it stands in the policy file.
        timeout: seconds for the second opinion, or for a byte of another server.
        budget: how often a minute; what comes on top of that has failed. None: as often as it takes.
        probe: the second condition, ready to run; None without one.
        steer: position of the steer of the second attempt; None without one.
    """

    do: Do
    timeout: float
    budget: int | None
    probe: Condition | None = None
    steer: int | None = None

    @property
    def releases_the_better(self) -> bool:
        """Whether, of two replies on which the rule fires, the better one is released."""
        return self.do.otherwise is Otherwise.RELEASE

    @property
    def on_failure(self) -> Action:
        """What is done if nobody gives an answer."""
        return Action(self.do.on_failure or Action.BLOCK)

    @property
    def to(self) -> Destination:
        """Where it turns to.

        Raises:
            ValueError: it is a rule that regenerates.
        """
        if self.do.to is None:
            raise ValueError(f"a rule that does {self.do.action.value} turns to nobody")
        return self.do.to
