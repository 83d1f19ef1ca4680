"""Rules and policies made ready to run: they point into a plan's checks and steers. Plain data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from monitor.attempt import DEFERRED, Attempt, Holds
from monitor.condition import Condition, verdicts_of
from monitor.handling import Handling
from monitor.probing import ProbingSettings
from monitor.rollout import Share, Subjects
from monitor.rule import Scope
from monitor.session import Conversation
from monitor.types import Action, Expose, Mode
from monitor.verdicts import AnyCheck
from probes.card import Format, Stage


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule whose condition rests on checks of the plan, by their positions.

    ``steer`` is the position of a steer, ``gate`` that of the gate by which the engine finds its rows in the pass
    itself; None where the scheduler has to. ``share`` says for whom it is enforced; None for everybody. ``scope`` is
    of a block. ``handling`` is how the API process carries it out; None where the engine does. ``holds`` says how long
    replies are withheld because of it, while it is enforced. With a ``conversation`` nothing in a request makes it
    true: it acts from a request's beginning where it stands against the session.
    """

    name: str
    condition: Condition
    action: Action
    mode: Mode
    text: str
    steer: int | None = None
    gate: int | None = None
    share: Share | None = None
    scope: Scope = Scope.CHOICE
    target_fpr: Mapping[Format, float] = field(default_factory=dict)
    conversation: Conversation | None = None
    handling: Handling | None = None
    holds: Holds = Holds.NOTHING

    def does(self, attempt: Attempt) -> Action:
        """What it does to a request.

        What was decided about a prompt and led to a second attempt is done: it flags. A reply is judged anew.

        Args:
            attempt: which one at an answer the request is.
        """
        if self.action not in DEFERRED or attempt is Attempt.FIRST:
            return self.action
        if attempt is Attempt.UNHELD:
            return Action.BLOCK
        if self.holds is Holds.PROMPT:
            return Action.FLAG
        better = self.handling is not None and self.handling.releases_the_better
        return self.action if self.action is Action.ESCALATE or better else Action.BLOCK

    def ends(self, attempt: Attempt) -> bool:
        """Whether further tokens of a request on which it has fired are of no use."""
        does = self.does(attempt)
        better = self.handling is not None and self.handling.releases_the_better
        return does in {Action.ROUTE, Action.BLOCK} or (does is Action.REGENERATE and not better)

    @property
    def verdicts(self) -> tuple[int, ...]:
        """The checks that say whether it fires."""
        return tuple(number for number, _ in verdicts_of(self.condition))

    def rests_on(self, stage: Stage, checks: Sequence[AnyCheck]) -> bool:
        """Whether one of its verdicts is of a stage."""
        return any(checks[number].stage is stage for number in self.verdicts)

    def waits_for_prompt(self, checks: Sequence[AnyCheck]) -> bool:
        """Whether it may become true by what does not fire when the prompt is through."""
        return any(negated and checks[number].stage is Stage.PROMPT for number, negated in verdicts_of(self.condition))

    def waits_for_end(self, checks: Sequence[AnyCheck]) -> bool:
        """Whether it may become true only when the reply has ended."""
        return any(
            checks[number].stage is Stage.RESPONSE or (negated and checks[number].stage is Stage.STREAM)
            for number, negated in verdicts_of(self.condition)
        )

    def waits_for_unfired_end(self, checks: Sequence[AnyCheck]) -> bool:
        """Whether it may become true by what has not fired when the reply has ended."""
        return any(
            negated and checks[number].stage is not Stage.PROMPT for number, negated in verdicts_of(self.condition)
        )


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy whose rules point into the plan's checks.

    ``steers``, those of every request, and ``on_request``, those that one may ask for, point into its steers. Scores
    that clients are told are rounded to a multiple of ``quantise``; 0: to four digits. ``probing``: whether its tenants
    are watched for it.
    """

    name: str
    on_gap: Action
    on_uncalibrated: Action
    hold_back: int
    expose: Expose
    text: str
    rules: tuple[CompiledRule, ...]
    checks: tuple[int, ...]
    steers: tuple[int, ...] = ()
    on_request: tuple[int, ...] = ()
    quantise: float = 0.0
    probing: ProbingSettings | None = None

    @property
    def conversations(self) -> tuple[CompiledRule, ...]:
        """The rules over conversations."""
        return tuple(rule for rule in self.rules if rule.conversation is not None)

    @property
    def told(self) -> tuple[int, ...]:
        """The checks that a client is told of: what is read for conversations only is none of them."""
        hidden = {rule.conversation.check for rule in self.rules if rule.conversation is not None}
        return tuple(check for check in self.checks if check not in hidden)

    @property
    def holds(self) -> Holds:
        """How long replies are withheld because of some rule."""
        return max((rule.holds for rule in self.rules), key=lambda holds: holds.rank, default=Holds.NOTHING)

    @property
    def second_steers(self) -> tuple[int, ...]:
        """Steers of second attempts, by their positions."""
        return tuple(
            rule.handling.steer for rule in self.rules if rule.handling is not None and rule.handling.steer is not None
        )

    @property
    def blocks_requests(self) -> bool:
        """Whether a rule may block all choices of a request for one of them."""
        return any(rule.scope is Scope.REQUEST for rule in self.rules)

    def outside(self, key: bytes, subjects: Subjects) -> frozenset[str]:
        """Names of the rules that are enforced for others than these, and run in shadow for them."""
        return frozenset(
            rule.name
            for rule in self.rules
            if rule.share is not None and not rule.share.holds(key, rule.name, subjects)
        )

    def uncalibrated(self, checks: Sequence[AnyCheck], fmt: Format, outside: Collection[str] = frozenset()) -> bool:
        """Whether a rule that is enforced rests on a check that has no threshold for this format.

        Args:
            checks: of the plan.
            fmt: of the request.
            outside: names of rules that are not enforced for it.
        """
        return any(
            rule.mode is Mode.ENFORCE
            and rule.name not in outside
            and (
                any(fmt not in checks[number].thresholds for number in rule.verdicts)
                or (rule.conversation is not None and fmt not in rule.conversation.formats)
            )
            for rule in self.rules
        )
