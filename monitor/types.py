"""The words of a decision: actions, modes, reasons. Knows no engine and no configuration file."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Action(StrEnum):
    """What is done about a request."""

    ALLOW = "allow"
    FLAG = "flag"
    BLOCK = "block"

    @property
    def severity(self) -> int:
        """Higher is more severe; a rule may only raise a request's action."""
        return _SEVERITY.index(self)


_SEVERITY = (Action.ALLOW, Action.FLAG, Action.BLOCK)


class Mode(StrEnum):
    """Whether a rule acts."""

    SHADOW = "shadow"
    """Counted as what it would have done; nothing else happens."""
    ENFORCE = "enforce"


class Expose(StrEnum):
    """What a client is told."""

    ACTIONS = "actions"
    SCORES = "scores"
    """Scores and thresholds too: whoever has them can search for prompts that pass."""


class Gap(StrEnum):
    """Why a position was not scored although it should have been."""

    UNSEEN = "unseen"
    """It was never computed in front of a tap (a cached prefix, a lost step)."""
    NO_READOUTS = "no_readouts"
    """The step came back from the worker without readouts."""
    NOT_FINITE = "not_finite"
    """A readout was NaN or infinite."""
    MONITOR_ERROR = "monitor_error"
    """The monitor itself failed on the step."""
    CANARY = "canary"
    """It was read and judged while the engine's canary did not pass: what was read cannot be relied on."""


class Skip(StrEnum):
    """Why a position is rightly not scored."""

    SINK = "sink"
    """One of the leading positions with a huge norm that the detector's card excludes."""
    FINAL = "final"
    """The last sampled token: it is never fed back, so the model never computes it."""


class ActionCode(IntEnum):
    """Actions as small numbers, for arrays and the wire; ordered by severity."""

    ALLOW = 0
    FLAG = 1
    BLOCK = 2

    @property
    def action(self) -> Action:
        """The action that this number stands for."""
        return _SEVERITY[self.value]


ON_GAP = "on_gap"
"""Named as the rule where the policy's ``on_gap`` decided."""
ON_UNCALIBRATED = "on_uncalibrated"
"""Named as the rule where the policy's ``on_uncalibrated`` decided."""
RESERVED_RULES = (ON_GAP, ON_UNCALIBRATED)
