"""Puts a plan into every engine and worker, one step after the other, through the door. Decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import structlog

from monitor.policy import Plan
from probes.columns import Residents, Room
from probes.errors import TelltaleError
from serving.deployment import Deployment

log = structlog.get_logger(__name__)

_ANSWER_SECONDS = 60.0
_BUILD_SECONDS = 300.0
_POLL_SECONDS = 0.02


class ReloadFailedError(TelltaleError, RuntimeError):
    """A policy could not be put in place; what ran before still runs."""


class PlanInstaller:
    """Speaks to all engines that an API process has.

    Args:
        engine: vLLM's ``AsyncLLM``.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def held(self) -> set[str]:
        """Digests of the plans that some engine keeps: for its requests, or for those on their way.

        Raises:
            ReloadFailedError: an engine does not answer.
        """
        answers = await self._ask("generations", {})
        return {digest for answer in answers for digest in answer["held"]}

    async def admit(self, digest: str) -> None:
        """Let requests begin with a plan that is built and whose columns are written.

        Raises:
            ReloadFailedError: an engine refuses.
        """
        await self._ask("admit", {"digest": digest})

    async def commit(self, digest: str) -> None:
        """Put it in force.

        Raises:
            ReloadFailedError: an engine refuses; others may have done it.
        """
        await self._ask("commit", {"digest": digest})

    async def take_back(self, digest: str, *, running: str) -> None:
        """As if nothing had been tried, as far as an engine still answers.

        Args:
            digest: of the plan that was to come in.
            running: of the one that stays.
        """
        for op, plan in (("commit", running), ("discard", digest)):
            try:
                await self._ask(op, {"digest": plan})
            except ReloadFailedError as error:
                log.error("an engine does not take a policy back; no request is signed under it", why=str(error))  # noqa: TRY400

    async def prepare(self, found: Deployment, room: Room, needed: Room) -> None:
        """Have every engine build it, and wait until all have.

        Args:
            found: as this process has built it.
            room: what is free.
            needed: what would be, see ``redeploy``.
        Raises:
            ReloadFailedError: one of them cannot.
        """
        digest = found.plan.digest
        body = {
            "digest": digest,
            "text": found.file.text,
            "path": str(found.file.path),
            "room": room.as_json(),
            "needed": needed.as_json(),
        }
        await self._ask("prepare", body)
        deadline = time.monotonic() + _BUILD_SECONDS
        while True:
            answers = await self._ask("prepared", {"digest": digest})
            refused = next((answer["refused"] for answer in answers if answer["refused"] is not None), None)
            if refused is not None:
                raise ReloadFailedError(f"an engine cannot build it: {refused}.")
            if all(answer["done"] for answer in answers):
                return
            if time.monotonic() > deadline:
                raise ReloadFailedError(f"an engine has not built it within {_BUILD_SECONDS:g} s.")
            await asyncio.sleep(_POLL_SECONDS)

    async def write(self, plan: Plan, taken: Residents) -> None:
        """Put new directions into free columns on every worker, and make sure of what stands there.

        Args:
            plan: that is to run.
            taken: columns that hold what other plans read, and what this one shares with them.
        Raises:
            ReloadFailedError: a worker holds something else, or none has the tap.
        """
        fresh: dict[str, list[str]] = {}
        columns = []
        for matrix, (tap, residents) in zip(plan.bank.matrices, plan.bank.residents().items(), strict=True):
            places = [column for column in residents if column not in taken.get(tap, {})]
            if not places:
                continue
            fresh[str(tap)] = [residents[column] for column in places]
            weight = np.ascontiguousarray(matrix.weight[:, places])
            columns.append([str(tap), places, weight.tobytes(), matrix.bias[places].tobytes()])
        if not columns:
            return
        answers = await self._answered("collective_rpc", "telltale_write", None, (columns,), {})
        for answer in answers:
            written: dict[str, list[str]] = {}
            for worker in answer:
                for tap, digests in worker.items():
                    if digests != fresh[tap]:
                        raise ReloadFailedError(f"a worker holds other numbers at {tap} than were written there.")
                    written[tap] = digests
            if missing := sorted(fresh.keys() - written.keys()):
                raise ReloadFailedError(f"no worker has the tap {missing[0]}.")

    async def _ask(self, op: str, body: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return await self._answered("telltale_control", op, dict(body))

    async def _answered(self, method: str, *args: Any) -> Sequence[Any]:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                answers: Sequence[Any] = await self._engine.engine_core.call_utility_all_async(method, *args)
        except TimeoutError as error:
            raise ReloadFailedError(f"an engine does not answer within {_ANSWER_SECONDS:g} s ({args[0]}).") from error
        except Exception as error:  # vLLM passes on the other process's failure as a bare Exception
            log.exception("an engine refuses a step of a reload", step=args[0])
            raise ReloadFailedError(f"an engine refuses ({args[0]}): {error}.") from error
        return answers
