"""The door into an engine: what its scheduler is asked between two steps, and how another plan comes in.

A plan comes in through four questions. ``prepare`` has it built beside the running steps and ``prepared`` says how that
went; ``admit`` lets requests begin with it, which are only its canaries at first; ``commit`` puts it in force. Until
then ``discard`` takes it back, and nothing has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import structlog

import serving
from monitor.generations import Generations
from monitor.policy import Plan
from probes.bank import Bank
from probes.columns import Room
from probes.errors import TelltaleError
from serving.deployment import Deployment
from serving.engine.heartbeats import Heartbeats
from serving.redeploy import redeploy

log = structlog.get_logger(__name__)


class HoldsBanks(Protocol):
    """Keeps what banks read."""

    def hold(self, banks: Mapping[str, Bank]) -> None:
        """Keep what these banks read from now on, by the digests of their plans."""


class HoldsPlans(Protocol):
    """Keeps what plans write."""

    def hold(self, plans: list[Plan]) -> None:
        """These plans may have requests from now on."""


@dataclass(slots=True)
class _Candidate:
    """A plan that is being built.

    Attributes:
        digest: that it must have.
        plan: once it is there.
        refused: why it will not come.
    """

    digest: str
    plan: Plan | None = None
    refused: str | None = None


@dataclass(slots=True)
class Door:
    """Answers the API process, in the scheduler's own thread between two steps.

    Attributes:
        started: what the engine was started with.
        generations: of the engine.
        heartbeats: likewise.
        prefix: readouts of cached prefixes; None where there is no cache.
        steers: what is written.
    """

    started: Deployment
    generations: Generations
    heartbeats: Heartbeats
    prefix: HoldsBanks | None
    steers: HoldsPlans
    _candidate: _Candidate | None = field(default=None, init=False)

    def answer(self, op: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is asked.

        Args:
            op: ``handshake`` (version and digest of what runs here), ``canary`` (how the canaries of a plan do),
                ``generations`` (which plans are kept), or one of ``prepare``, ``prepared``, ``admit``, ``commit`` and
                ``discard``, which bring another plan in.
            body: of the operation.
        Raises:
            ValueError: another operation, or one that cannot be done now.
        """
        digest = str(body.get("digest", ""))
        match op:
            case "handshake":
                return {"version": serving.__version__, "digest": self.generations.plan.digest}
            case "canary":
                return self.heartbeats.status(body.get("plan"))
            case "generations":
                self.generations.release()
                self._hold()
                return {"current": self.generations.plan.digest, "held": sorted(self.generations.plans)}
            case "prepared":
                return self._prepared(digest)
            case "prepare":
                self._prepare(digest, body)
            case "admit":
                self._admit(digest)
            case "commit":
                self._commit(digest)
            case "discard":
                self._discard(digest)
            case _:
                raise ValueError(f"telltale_control knows no {op!r}")
        return {}

    def _prepare(self, digest: str, body: Mapping[str, Any]) -> None:
        candidate = _Candidate(digest)
        self._candidate = candidate
        kept = self.generations.plans.get(candidate.digest)
        if kept is not None:
            candidate.plan = kept
            self.generations.add(kept)
            return
        room, needed = Room.of_json(body["room"]), Room.of_json(body["needed"])
        text, path = str(body["text"]), Path(body["path"])

        def build() -> None:
            try:
                plan = redeploy(self.started, text, path=path, room=room, needed=needed).plan
            except TelltaleError as error:
                candidate.refused = str(error)
                return
            except Exception as error:
                # Of a kind that is anybody's code: the engine goes on with what it has.
                log.exception("another plan cannot be built")
                candidate.refused = f"building it failed ({type(error).__name__})"
                return
            if plan.digest == candidate.digest:
                candidate.plan = plan
            else:
                candidate.refused = "the engine reads other files than the API process: an artifact has just changed"

        # Loading detectors takes longer than a step; no token waits for it.
        threading.Thread(target=build, name="telltale-prepare", daemon=True).start()

    def _prepared(self, digest: str) -> dict[str, Any]:
        candidate = self._expected(digest)
        return {"done": candidate.plan is not None or candidate.refused is not None, "refused": candidate.refused}

    def _admit(self, digest: str) -> None:
        plan = self._expected(digest).plan
        if plan is None:
            raise ValueError(f"the plan {digest} is not built yet")
        self.generations.add(plan)
        self.heartbeats.add(plan)
        self._hold()

    def _commit(self, digest: str) -> None:
        self.generations.commit(digest)
        self.heartbeats.commit(self.generations.plan)
        log.info("monitoring by another plan", digest=digest[:12])

    def _discard(self, digest: str) -> None:
        self.generations.discard(digest)
        self.heartbeats.discard(digest)
        self._candidate = None
        self._hold()

    def _expected(self, digest: str) -> _Candidate:
        if self._candidate is None or self._candidate.digest != digest:
            raise ValueError(f"the plan {digest} is not being prepared here")
        return self._candidate

    def _hold(self) -> None:
        plans = self.generations.plans
        self.steers.hold(list(plans.values()))
        if self.prefix is not None:
            self.prefix.hold({digest: plan.bank for digest, plan in plans.items()})
