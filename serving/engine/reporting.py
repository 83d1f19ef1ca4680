"""What the API processes are told of a step: each hears of its own requests, and one of them takes the tally."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from monitor.generations import Generations
from monitor.monitor import Ended
from monitor.report import StepReport, TallyReport, encode_report, make_report, take_tally
from monitor.request import Request as Admitted
from serving.engine.carrier import CARRIER_ID

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Reporting:
    """Reports of one engine, carried by its outputs.

    Args:
        monitors: what is reported on.
    """

    def __init__(self, monitors: Generations) -> None:
        self._monitors = monitors
        self._clients: dict[str, int] = {}
        self._ended: dict[int, list[Ended]] = {}
        # Requests that the API process knows of and need not hear of again before they end.
        self._settled: set[str] = set()
        self._seconds: list[float] = []

    def admit(self, request: Request) -> None:
        """A request has come; whoever sent it will hear of it."""
        self._clients[request.request_id] = request.client_index

    def end(self, request: Request, ended: Ended | None) -> None:
        """It has ended.

        Args:
            request: vLLM's.
            ended: the monitor's account; None if it did not know the request.
        """
        client = self._clients.pop(request.request_id, request.client_index)
        self._settled.discard(request.request_id)
        if ended is not None:
            self._ended.setdefault(client, []).append(ended)

    def took(self, seconds: float) -> None:
        """A step has been judged in so many seconds."""
        self._seconds.append(seconds)

    def attach(
        self, outputs: dict[int, EngineCoreOutputs], step_ids: Sequence[str], requests: Mapping[str, Request]
    ) -> None:
        """Put reports in front of a step's outputs.

        Args:
            outputs: by client; changed in place.
            step_ids: requests of the step.
            requests: vLLM's, those that live.
        """
        by_client: dict[int, list[Any]] = {client: [] for client in self._ended}
        for request_id in step_ids:
            if request_id in self._settled:
                continue
            request = self._monitors.get(request_id)
            if request is not None:
                by_client.setdefault(self._clients[request_id], []).append(request)
                if not _ends_outside(requests.get(request_id)):
                    self._settled.add(request_id)
        if not by_client and step_ids and step_ids[0] in self._clients:
            by_client[self._clients[step_ids[0]]] = []
        tally = take_tally(self._monitors, self._seconds) if by_client else None
        if tally is not None:
            self._seconds = []
        for client, told in by_client.items():
            carriers = []
            for report in self._reports(told, self._ended.pop(client, []), tally):
                tally = None
                data = encode_report(report)
                carriers.append(EngineCoreOutput(request_id=CARRIER_ID, new_token_ids=[], routed_experts=data))
            holder = outputs.setdefault(client, EngineCoreOutputs())
            holder.outputs = [*carriers, *holder.outputs]

    def _reports(
        self, told: Sequence[Admitted], ended: Sequence[Ended], tally: TallyReport | None
    ) -> Iterator[StepReport]:
        """One report for each plan that some of these are under: numbers of checks mean another thing in another."""
        plans = {request.plan: None for request in (*told, *(item.request for item in ended))}
        for plan in plans or {self._monitors.plan.digest: None}:
            yield make_report(
                self._monitors.monitor_of(plan),
                [request for request in told if request.plan == plan],
                [item for item in ended if item.request.plan == plan],
                tally,
                plan=plan,
            )
            tally = None


def _ends_outside(request: Request | None) -> bool:
    """Whether its reply may end without the engine: stop strings are found where text is made of tokens."""
    params = request.sampling_params if request is not None else None
    return params is not None and bool(params.stop)
