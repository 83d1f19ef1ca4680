"""Brings another policy into a server that runs: built, put in place, proved by its canaries, and only then in force.

Nothing changes for anybody before the last step. Requests keep the plan that they were signed under, so that the step
needs no moment at which all processes switch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import structlog

from monitor.canary import Failed
from monitor.events import PolicyReloaded
from monitor.history import History, Reload
from monitor.policy import Plan
from monitor.reload import RestartNeededError
from monitor.types import ReloadOutcome, ReloadSource
from monitor.yaml_file import read_policy_text
from probes.columns import Room, union
from probes.errors import TelltaleError
from serving.deployment import Deployment
from serving.engine.canary import Canaries
from serving.engine.frontend import Frontend
from serving.engine.plan_installer import PlanInstaller, ReloadFailedError
from serving.redeploy import NoFreeColumnError, redeploy

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Listeners:
    """Parts of the API process that a policy concerns.

    Attributes:
        check: refuses a deployment that does not fit this process, by a ``TelltaleError``.
        adopt: takes over what it needs of one that is in force.
    """

    check: Callable[[Deployment], None]
    adopt: Callable[[Deployment], None]


class Reloader:
    """The policies of a running server.

    Args:
        engine: vLLM's ``AsyncLLM``.
        frontend: of this process.
        canaries: of its engines.
        listeners: in this process.
    """

    def __init__(self, engine: Any, frontend: Frontend, canaries: Canaries, listeners: Listeners) -> None:
        self._engine = engine
        self._engines = PlanInstaller(engine)
        self._frontend = frontend
        self._canaries = canaries
        self._listeners = listeners
        self._started = self._running = frontend.deployment
        digest, text = self._started.plan.digest, self._started.file.text
        start = Reload(
            0, datetime.now(UTC), ReloadSource.START, ReloadOutcome.APPLIED, digest, digest, text,
        )  # fmt: skip
        self._held = {digest: self._started}
        # Plans that the engines have forgotten: what was on its way when they did may still speak of them.
        self._gone: dict[str, Deployment] = {}
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Future[Reload]] = set()
        self.history = History(start)

    async def reload(self, text: str, source: ReloadSource) -> Reload:
        """Put a policy in force, if it can be.

        Args:
            text: of the policy file; paths in it are relative to the folder of the one that the server began with.
            source: where it comes from.
        Returns: what came of it, which is in the history too.
        """
        return await self._finished(self._in_turn(lambda: self._reload(lambda: text, source)))

    async def reload_file(self, source: ReloadSource) -> Reload:
        """Put in force what stands in the policy file that the server was started with.

        Args:
            source: why it is read.
        Returns: what came of it.
        """
        path = self._started.file.path
        return await self._finished(self._in_turn(lambda: self._reload(lambda: read_policy_text(path), source)))

    async def roll_back(self, number: int | None = None) -> Reload:
        """Put in force what ran before.

        Args:
            number: of the entry in the history; the one before the newest if left out.
        Returns: what came of it.
        Raises:
            monitor.history.HistoryError: there is no such entry.
        """

        def back() -> Coroutine[Any, Any, Reload]:
            entry = self.history.target(number)
            return self._reload(lambda: entry.text, ReloadSource.ROLLBACK, expected=entry.digest)

        return await self._finished(self._in_turn(back))

    async def _in_turn(self, begin: Callable[[], Coroutine[Any, Any, Reload]]) -> Reload:
        async with self._turn:
            return await begin()

    async def _finished(self, work: Coroutine[Any, Any, Reload]) -> Reload:
        """Whoever asked may leave: what was begun is brought to its end, so that engines and front end agree."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _reload(self, read: Callable[[], str], source: ReloadSource, expected: str | None = None) -> Reload:
        began, before = time.monotonic(), self._running.plan.digest
        found: Deployment | None = None
        text, message, setting = "", "", None
        try:
            text = read()
            found = await self._built(text)
            _require_digest(found.plan, expected)
            outcome = ReloadOutcome.APPLIED
            if found.plan.digest != before:
                await self._bring_in(found)
            elif found.file.config.access != self._running.file.config.access:
                self._adopt(found)  # who is let in, which no engine need know
            else:
                outcome = ReloadOutcome.UNCHANGED
        except RestartNeededError as error:
            outcome, message, setting = ReloadOutcome.RESTART_NEEDED, str(error), error.setting
        except NoFreeColumnError as error:
            outcome, message = ReloadOutcome.NO_ROOM, str(error)
        except ReloadFailedError as error:
            outcome, message = ReloadOutcome.FAILED, str(error)
        except TelltaleError as error:
            outcome, message = ReloadOutcome.REFUSED, str(error)
        entry = Reload(
            self.history.next_number,
            datetime.now(UTC),
            source,
            outcome,
            found.plan.digest if found is not None else None,
            before,
            text,
            message,
            setting,
            time.monotonic() - began,
        )
        self._note(entry)
        return entry

    def _note(self, entry: Reload) -> None:
        self.history.add(entry)
        self._frontend.policy_reloaded(
            PolicyReloaded(
                plan=entry.digest,
                before=entry.before,
                source=entry.source,
                outcome=entry.outcome,
                setting=entry.setting,
            )
        )
        say = log.info if entry.outcome in {ReloadOutcome.APPLIED, ReloadOutcome.UNCHANGED} else log.error
        say(
            "policy",
            outcome=entry.outcome.value,
            source=entry.source.value,
            digest=(entry.digest or "")[:12],
            before=entry.before[:12],
            seconds=round(entry.seconds, 3),
            **({"why": entry.message} if entry.message else {}),
        )

    async def _built(self, text: str) -> Deployment:
        """The policy with everything that it needs, in this process alone."""
        count = int(self._engine.vllm_config.parallel_config._api_process_count)
        if count > 1:
            raise RestartNeededError(
                "--api-server-count",
                f"this server has {count} API processes, and each would have to sign by the new policy at once. Start "
                "again with the new policy, or serve with --api-server-count 1.",
            )
        await self._forget_released()
        path = self._started.file.path
        room, needed = self._room()
        try:
            found = await asyncio.to_thread(redeploy, self._started, text, path=path, room=room, needed=needed)
        except TelltaleError:
            raise
        except Exception as error:  # a detector's kind may be anybody's code
            log.exception("a policy cannot be built")
            raise ReloadFailedError(f"building it failed ({type(error).__name__}); the log says where.") from error
        self._listeners.check(found)
        # One that is still in the engines stands in the columns that it had.
        held = self._held.get(found.plan.digest)
        return replace(found, plan=held.plan) if held is not None else found

    async def _forget_released(self) -> None:
        """Ask the engines which plans they still keep; columns of all others are free."""
        kept = await self._engines.held() | {self._running.plan.digest}
        gone = {digest: held for digest, held in self._held.items() if digest not in kept}
        self._held = {digest: held for digest, held in self._held.items() if digest in kept}
        self._gone, earlier = gone, self._gone
        if earlier or gone:
            self._frontend.hold(self._known())

    def _known(self) -> dict[str, Plan]:
        return {digest: deployment.plan for digest, deployment in {**self._gone, **self._held}.items()}

    def _room(self) -> tuple[Room, Room]:
        """What is free, and what would be if no request ran under an older plan."""
        taps = self._started.plan.bank.taps
        taken = union(*(held.plan.bank.residents() for held in self._held.values()))
        return Room(taps, taken), Room(taps, self._running.plan.bank.residents())

    async def _bring_in(self, found: Deployment) -> None:
        digest = found.plan.digest
        room, needed = self._room()
        try:
            await self._engines.prepare(found, room, needed)
            await self._engines.write(found.plan, room.taken)
            await self._engines.admit(digest)
            self._held[digest] = found
            self._frontend.hold(self._known())
            proved = Canaries(self._engine, self._frontend, found)
            _require_passed(await proved.round())
            async with self._canaries.turn:
                await self._engines.commit(digest)
                # From here on, without an await between: requests are signed under it.
                self._adopt(found)
                self._canaries.follow(proved)
        except ReloadFailedError:
            await self._engines.take_back(digest, running=self._running.plan.digest)
            raise

    def _adopt(self, found: Deployment) -> None:
        self._running = found
        self._frontend.adopt(found)
        self._listeners.adopt(found)


def _require_digest(plan: Plan, expected: str | None) -> None:
    if expected is not None and plan.digest != expected:
        raise ReloadFailedError(
            f"the same text makes the plan {plan.digest[:12]}... now, it was {expected[:12]}...: an artifact that it "
            "names has changed since. Put it back, or load the policy anew."
        )


def _require_passed(failure: Failed | None) -> None:
    if failure is not None:
        # The detail holds scores: it is for the log alone.
        log.error("the canary of another policy does not pass", reason=failure.reason.value, detail=failure.detail)
        raise ReloadFailedError(
            f"its canary does not pass ({failure.reason.value}), so that it was not put in force. The log says more."
        )
