"""Conversations in an API process: what stands against a request when it comes, what becomes of its session after it.

The decision falls here, before the engine; it is carried out in the engine, like every other one, and travels there
under the MAC. Responses say nothing of sessions.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import ParamSpec, TypeVar

import structlog
from prometheus_client import CollectorRegistry
from starlette.types import Message, Send

from monitor.compiled import CompiledPolicy, CompiledRule
from monitor.events import ConversationFired
from monitor.policy import Plan
from monitor.rollout import Subject
from monitor.session import Conversation, Fired, Session, advance
from monitor.sessions.memory import MemoryStore
from monitor.sessions.metrics import Operation, SessionMetrics
from monitor.sessions.settings import SessionSettings
from monitor.sessions.store import SessionKey, SessionStore, SessionStoreError
from monitor.types import ON_SESSION_FAILURE
from serving.api.probing import ProbingWatch
from serving.engine.ledger import Ledger
from serving.origin import Caller
from serving.sitting import Reading, Sitting

log = structlog.get_logger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_SECONDS = 3.0
_THREADS = 8


class Sessions:
    """The sessions of one API process.

    Args:
        plan: gives what runs.
        store: of sessions.
        metrics: what Prometheus is told.
        ledger: gives where events are entered; None if they are not.
        probing: watches the requests of tenants too; None if it does not.
        clock: Unix seconds.
        patience: seconds that a remote store may take.
    """

    def __init__(
        self,
        plan: Callable[[], Plan],
        store: SessionStore,
        metrics: SessionMetrics,
        *,
        ledger: Callable[[], Ledger | None] = lambda: None,
        probing: ProbingWatch | None = None,
        clock: Callable[[], float] = time.time,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._plan = plan
        self._store = store
        self._metrics = metrics
        self._ledger = ledger
        self._probing = probing
        self._clock = clock
        self._patience = patience
        self._known = ""
        self._policies: dict[str, CompiledPolicy] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "telltale-sessions") if store.is_remote else None

    async def begin(self, caller: Caller) -> Sitting | None:
        """A request has come.

        Args:
            caller: who sent it.
        Returns: its part in its session; None if its policy has no rule over conversations, and watches nobody.
        """
        policy = self._policy_of(caller)
        rules = policy.conversations
        if not rules and policy.probing is None:
            return None
        wanted = {rule.conversation.by for rule in rules if rule.conversation is not None}
        keys = {by: key for by in sorted(wanted) if (key := _key(caller, by)) is not None}
        if Subject.SESSION in wanted:
            self._metrics.request(named=Subject.SESSION in keys)
        now = self._clock()
        try:
            found = {by: await self._ask(self._store.read, key, now) for by, key in keys.items()}
        except SessionStoreError as error:
            self._failed(Operation.READ, error)
            imposed: tuple[str, ...] = (ON_SESSION_FAILURE,)
        else:
            imposed = tuple(rule.name for rule in rules if _stands(rule, found, now))
        return Sitting(caller.tenant, keys, imposed, self._commit)

    def _policy_of(self, caller: Caller) -> CompiledPolicy:
        plan = self._plan()
        if self._known != plan.digest:
            self._policies = {policy.name: policy for policy in plan.policies}
            self._metrics.begin(plan)
            self._known = plan.digest
        return self._policies.get(caller.policy or "", plan.policies[0])

    def close(self) -> None:
        """Let go of the store."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    async def _commit(self, sitting: Sitting, reading: Reading) -> None:
        """Enter a request that has ended."""
        if self._probing is not None:
            self._probing.see(sitting, reading)
        policy = reading.plan.policies[reading.policy]
        for by, key in sitting.keys.items():
            readings = [
                (rule.conversation, reading.statistics[rule.conversation.check])
                for rule in policy.conversations
                if rule.conversation is not None
                and rule.conversation.by is by
                and reading.fmt in rule.conversation.formats
            ]
            now = self._clock()
            change = _Change(readings, now)
            try:
                await self._ask(self._store.update, key, change, now)
            except SessionStoreError as error:
                self._failed(Operation.UPDATE, error)
                continue
            for fired in change.fired:
                self._fired(policy, fired, sitting, reading)
        if isinstance(self._store, MemoryStore):
            self._metrics.remembered(len(self._store))

    def _fired(self, policy: CompiledPolicy, fired: Fired, sitting: Sitting, reading: Reading) -> None:
        for rule in policy.conversations:
            conversation = rule.conversation
            if conversation is None or conversation.key != fired.key:
                continue
            self._metrics.fired(rule.name, rule.action.value, rule.mode.value, policy.name)
            ledger = self._ledger()
            if ledger is None:
                continue
            event = ConversationFired(
                plan=reading.plan.digest,
                policy=policy.name,
                rule=rule.name,
                action=rule.action,
                mode=rule.mode,
                detector=reading.plan.checks[conversation.check].detector,
                accumulator=str(conversation.accumulator),
                value=fired.value,
                threshold=conversation.threshold,
                requests=fired.requests,
                until=datetime.fromtimestamp(fired.until, UTC) if math.isfinite(fired.until) else None,
            )
            ticket = ledger.noticed(event, reading.request_id, sitting.tenant or None)
            if ticket is not None:
                sitting.tickets.append(ticket)

    def _failed(self, operation: Operation, error: SessionStoreError) -> None:
        self._metrics.failed(operation)
        log.error("the store of sessions failed", operation=operation.value, error=str(error))

    async def _ask(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the store.

        Raises:
            SessionStoreError: it cannot be reached, or takes too long.
        """
        if self._pool is None:
            return method(*args, **kwargs)
        answer = asyncio.wrap_future(self._pool.submit(method, *args, **kwargs))
        try:
            return await asyncio.wait_for(answer, self._patience)
        except TimeoutError:
            raise SessionStoreError(f"the store of sessions has not answered for {self._patience:g} s") from None


class _Change:
    """What a request makes of a session, for a store, which may ask more than once; the last answer counts."""

    def __init__(self, readings: list[tuple[Conversation, float]], now: float) -> None:
        self._readings = readings
        self._now = now
        self.fired: tuple[Fired, ...] = ()

    def __call__(self, before: Session | None) -> Session:
        after, self.fired = advance(before, self._readings, self._now)
        return after


def held(sitting: Sitting, send: Send) -> Send:
    """ASGI's ``send`` for a request of a session: whoever has heard the end of a reply is known to have had it."""

    async def pass_on(message: Message) -> None:
        await sitting.settled()
        await send(message)

    return pass_on


def needs_sessions(plan: Plan) -> bool:
    """Whether a policy has a rule over conversations, or watches for probing."""
    return any(policy.conversations or policy.probing is not None for policy in plan.policies)


def open_sessions(
    plan: Callable[[], Plan],
    settings: SessionSettings,
    registry: CollectorRegistry,
    *,
    ledger: Callable[[], Ledger | None] = lambda: None,
) -> Sessions:
    """The sessions of this process.

    Args:
        plan: gives what runs.
        settings: of the policy file.
        registry: for metrics.
        ledger: gives where events are entered; None if they are not.
    Raises:
        SessionStoreError: the store cannot be opened.
    """
    metrics = SessionMetrics(registry)
    metrics.begin(plan())
    store: SessionStore
    if settings.url is None:
        store = MemoryStore(settings, metrics.forgotten)
    else:
        from monitor.sessions.postgresql import PostgresqlStore

        store = PostgresqlStore.open(settings, metrics.forgotten)
    sessions = Sessions(plan, store, metrics, ledger=ledger, probing=ProbingWatch(plan, registry, ledger))
    atexit.register(sessions.close)
    return sessions


def require_shared(plan: Plan, settings: SessionSettings, *, processes: int) -> None:
    """Refuse several API processes that would not see each other's sessions.

    Raises:
        SessionStoreError: they would not.
    """
    if settings.url is None and processes > 1 and any(policy.conversations for policy in plan.policies):
        raise SessionStoreError(
            f"{processes} API processes (--api-server-count) would each remember a part of every conversation. "
            "Name a database that they share, sessions: {url: postgresql://..., on_failure: block}, or run one."
        )


def _key(caller: Caller, by: Subject) -> SessionKey | None:
    if by is Subject.TENANT:
        return SessionKey.of(caller.tenant, None)
    return SessionKey.of(caller.tenant, caller.session) if caller.session else None


def _stands(rule: CompiledRule, found: dict[Subject, Session | None], now: float) -> bool:
    conversation = rule.conversation
    session = found.get(conversation.by) if conversation is not None else None
    return conversation is not None and session is not None and session.stand(conversation.key, now)
