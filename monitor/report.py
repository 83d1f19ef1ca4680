"""What the engine tells the API process once a step: the state of its requests, in few bytes. Knows no transport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec
import numpy as np
import numpy.typing as npt

from monitor.generations import Generations
from monitor.monitor import Ended, Monitor
from monitor.request import Request
from monitor.types import ActionCode, Gap


class Decided(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A decision other than allow.

    Attributes:
        action: ``ActionCode``.
        rule: the rule's name, or ``on_gap`` / ``on_uncalibrated``.
        text: what a blocked reply says.
    """

    action: int
    rule: str
    text: str


class Steered(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one steer did to a request; sizes in units of the stream's median norm."""

    steer: int
    tokens: int
    mean: float
    largest: float


class Trail(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What fired on a request: rules by name, by a check's position in the plan where it did, rules not enforced.

    ``stream_from`` is the position from which stream checks read.
    """

    acted: list[str]
    fired_at: dict[int, int]
    outside: list[str] = []
    stream_from: int = 0


class EndedReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that has ended. Statistics and fired are ordered as the plan's checks; events are of its prompt.

    ``tenant`` is who sent it, as the front end made sure of it; empty where nobody tells. One that is not ``counted``
    is none of a user's.
    """

    request_id: str
    policy: int
    fmt: str
    scored: int
    skipped: dict[str, int]
    statistics: list[float]
    fired: list[bool]
    decided: Decided | None
    events: list[str]
    steered: list[Steered]
    trail: Trail | None = None
    tenant: str = ""
    counted: bool = True


class TallyReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Counts since the report before, over all requests of the engine.

    ``overhead`` holds seconds by phase, one number for each step; ``held`` outputs are held back at present.
    """

    scored: int
    skipped: dict[str, int]
    gaps: dict[str, int]
    acted: list[tuple[str, str, str, str, int]]
    observe_seconds: list[float]
    events: dict[str, int]
    unsigned: int
    steered: dict[str, int]
    overhead: dict[str, list[float]] = {}
    held: int = 0


class StepReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One step, for one API process. Arrays have a column for each of ``request_ids``.

    Attributes:
        request_ids: requests that took part in the step and go on: those that are new to the API process, and those
            whose replies it may end by itself (stop strings). Of the others it hears again when they end.
        formats, policies: of each.
        scored, sink: (R,) int64 as bytes.
        statistics: (checks, R) float32 as bytes.
        fired: (checks, R) bool as bytes.
        decided: only of requests whose action is not allow.
        gaps: only of requests that have some.
        events: of their prompts, likewise.
        steered: likewise.
        ended: requests that have ended since the report before.
        tally: counts for metrics; None in all but one report of a step.
        trails: only of requests on which something fired.
        plan: digest of the plan that these requests are under; positions of checks and policies are its.
    """

    request_ids: list[str]
    formats: list[str]
    policies: list[int]
    scored: bytes
    sink: bytes
    statistics: bytes
    fired: bytes
    decided: dict[str, Decided]
    gaps: dict[str, dict[str, int]]
    events: dict[str, list[str]]
    steered: dict[str, list[Steered]]
    ended: list[EndedReport]
    tally: TallyReport | None
    trails: dict[str, Trail] = {}
    plan: str = ""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(StepReport)


def encode_report(report: StepReport) -> npt.NDArray[np.uint8]:
    """The report as bytes, in the array type that vLLM carries."""
    return np.frombuffer(_ENCODER.encode(report), dtype=np.uint8)


def decode_report(data: npt.NDArray[np.uint8]) -> StepReport:
    """Undo ``encode_report``.

    Raises:
        msgspec.MsgspecError: the bytes are not a report.
    """
    return _DECODER.decode(data.tobytes())


def make_report(
    monitor: Monitor,
    requests: Sequence[Request],
    ended: Sequence[Ended],
    tally: TallyReport | None,
    *,
    plan: str | None = None,
) -> StepReport:
    """The report of a step for the API process that these requests belong to.

    Args:
        monitor: of the plan that they are all under.
        requests: live ones.
        ended: those that have ended since the report before.
        tally: counts for metrics.
        plan: digest of the one that they are under; the monitor's if left out.
    """
    seen = monitor.snapshot(requests)
    remarkable = [request for request in requests if request.gaps or request.events or request.doses]
    return StepReport(
        request_ids=[request.request_id for request in requests],
        formats=[request.fmt for request in requests],
        policies=[request.policy for request in requests],
        scored=seen.scored.tobytes(),
        sink=seen.sink.tobytes(),
        statistics=seen.statistics.T.astype(np.float32).tobytes(),
        fired=seen.fired.T.tobytes(),
        decided={name: Decided(int(found.action), found.rule, found.text) for name, found in seen.decided.items()},
        gaps={request.request_id: _by_name(request.gaps) for request in remarkable if request.gaps},
        events={request.request_id: list(request.events) for request in remarkable if request.events},
        steered={request.request_id: _steered(request) for request in remarkable if request.doses},
        ended=[_ended(item) for item in ended],
        tally=tally,
        trails={request.request_id: trail for request in requests if (trail := _trail(request)) is not None},
        plan=plan or monitor.plan.digest,
    )


def take_tally(
    monitor: Monitor | Generations,
    observe_seconds: list[float],
    overhead: Mapping[str, list[float]] = MappingProxyType({}),
    held: int = 0,
) -> TallyReport:
    """The monitor's counts since the call before; they start anew.

    Args:
        monitor: whose.
        observe_seconds: of each step since then.
        overhead: of each step since then, by phase.
        held: outputs that are held back at present.
    """
    tally = monitor.take_tally()
    return TallyReport(
        scored=tally.scored,
        skipped={reason.value: count for reason, count in tally.skipped.items() if count},
        gaps=_by_name(tally.gaps),
        acted=[
            (rule, action.value, mode.value, policy, count)
            for (rule, action, mode, policy), count in tally.acted.items()
        ],
        observe_seconds=observe_seconds,
        events={event.value: count for event, count in tally.events.items()},
        unsigned=tally.unsigned,
        steered=dict(tally.steered),
        overhead=dict(overhead),
        held=held,
    )


def _ended(item: Ended) -> EndedReport:
    return EndedReport(
        request_id=item.request.request_id,
        policy=item.request.policy,
        fmt=item.request.fmt.value,
        scored=item.coverage.scored,
        skipped=item.coverage.skipped(),
        statistics=[float(value) for value in item.statistics],
        fired=[bool(value) for value in item.fired],
        decided=_decided(item.request.action, item.request.rule, item.request.text),
        events=list(item.request.events),
        steered=_steered(item.request),
        trail=_trail(item.request),
        tenant=item.request.tenant,
        counted=item.request.counted,
    )


def _trail(request: Request) -> Trail | None:
    if not (request.decided or request.fired_at or request.outside):
        return None
    return Trail(sorted(request.decided), dict(request.fired_at), sorted(request.outside), request.stream_from)


def _steered(request: Request) -> list[Steered]:
    return [
        Steered(number, dose.tokens, dose.mean, dose.largest)
        for number, dose in sorted(request.doses.items())
        if dose.tokens
    ]


def _decided(action: ActionCode, rule: str, text: str) -> Decided | None:
    return Decided(int(action), rule, text) if action is not ActionCode.ALLOW else None


def _by_name(gaps: Mapping[Gap, int]) -> dict[str, int]:
    return {gap.value: count for gap, count in gaps.items() if count}
