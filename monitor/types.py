"""The words of a decision: actions, modes, reasons. Knows no engine and no configuration file."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Action(StrEnum):
    """What is done about a request."""

    ALLOW = "allow"
    FLAG = "flag"
    STEER = "steer"
    """From the next row on, the model is written to."""
    ESCALATE = "escalate"
    """Somebody else is asked, and the reply waits for the answer."""
    ROUTE = "route"
    """Another model answers."""
    REGENERATE = "regenerate"
    """The model answers once more, under other conditions."""
    BLOCK = "block"

    @property
    def severity(self) -> int:
        """Higher is more severe; a rule may only raise a request's action."""
        return _SEVERITY.index(self)


_SEVERITY = (
    Action.ALLOW,
    Action.FLAG,
    Action.STEER,
    Action.ESCALATE,
    Action.ROUTE,
    Action.REGENERATE,
    Action.BLOCK,
)


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
    NOT_STEERED = "not_steered"
    """A steer should have written to it and did not."""
    CANARY = "canary"
    """It was read and judged while the engine's canary did not pass: what was read cannot be relied on."""


class Skip(StrEnum):
    """Why a position is rightly not scored."""

    SINK = "sink"
    """One of the leading positions with a huge norm that the detector's card excludes."""
    FINAL = "final"
    """The last sampled token: it is never fed back, so the model never computes it."""


class Phase(StrEnum):
    """What a step spends time on because it is monitored."""

    TAP = "tap"
    """Reading, inside the forward pass; told where the pass runs on a CPU and is not compiled, nobody can elsewhere."""
    TRANSFER = "transfer"
    """Readouts leave the worker's buffers for the scheduler."""
    OBSERVE = "observe"
    """Scores and aggregates."""
    POLICY = "policy"
    """Rules are judged."""
    REPORT = "report"
    """The API process is told."""
    API = "api"
    """The API process takes note."""


class Role(StrEnum):
    """Who wrote a token of a prompt. Where a token touches two roles, the one that stands further down counts."""

    TEMPLATE = "template"
    """The chat template: markers, role names, a default system prompt of its own."""
    SYSTEM = "system"
    """System and developer messages, and the definitions of tools."""
    REASONING = "reasoning"
    """Reasoning of earlier replies."""
    ASSISTANT = "assistant"
    """Earlier replies with their tool calls, and the beginning of this one."""
    USER = "user"
    """User messages, and whatever nobody can tell: raw prompts, for one."""
    TOOL = "tool"
    """What tools answered, and documents: text that neither the user nor the operator wrote."""

    @property
    def code(self) -> int:
        """A small number, for arrays."""
        return _ROLE_CODES[self]


_ROLE_CODES = {role: number for number, role in enumerate(Role)}


class PromptEvent(StrEnum):
    """What was noticed while a prompt was made of messages."""

    SPECIAL_TOKEN_IN_CONTENT = "special_token_in_content"  # noqa: S105 - a token of text, no password
    """Text of a message became a special token, such as the one that begins a turn."""
    SEGMENTS_UNKNOWN = "segments_unknown"
    """The tokens of a chat could not be told apart, so that every rule reads all of them."""


class ReloadSource(StrEnum):
    """What made a server read another policy."""

    START = "start"
    API = "api"
    SIGNAL = "signal"
    """``SIGHUP``."""
    FILE = "file"
    """The policy file has changed, and is watched."""
    ROLLBACK = "rollback"


class ReloadOutcome(StrEnum):
    """What came of it. Unless it was applied, nothing has changed."""

    APPLIED = "applied"
    UNCHANGED = "unchanged"
    """It says what runs already."""
    REFUSED = "refused"
    """The file or an artifact is wrong."""
    RESTART_NEEDED = "restart_needed"
    NO_ROOM = "no_room"
    """Requests under older policies hold the columns that it needs; they will end."""
    FAILED = "failed"
    """It could not be put in place, or its canary did not pass."""


class ActionCode(IntEnum):
    """Actions as small numbers, for arrays and the wire; ordered by severity."""

    ALLOW = 0
    FLAG = 1
    STEER = 2
    ESCALATE = 3
    ROUTE = 4
    REGENERATE = 5
    BLOCK = 6

    @property
    def action(self) -> Action:
        """The action that this number stands for."""
        return _SEVERITY[self.value]


ON_GAP = "on_gap"
"""Named as the rule where the policy's ``on_gap`` decided."""
ON_UNCALIBRATED = "on_uncalibrated"
"""Named as the rule where the policy's ``on_uncalibrated`` decided."""
ON_SESSION_FAILURE = "on_session_failure"
"""Named as the rule where ``sessions.on_failure`` decided: nobody could tell what a conversation has been like."""
RESERVED_RULES = (ON_GAP, ON_UNCALIBRATED, ON_SESSION_FAILURE)
STRICTEST = "strictest"
"""Named as the policy of requests that nobody vouches for, if there are several policies."""
