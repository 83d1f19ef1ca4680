"""What the API processes are told of a step: each hears of its own requests, and one of them takes the tally."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from monitor.monitor import Ended, Monitor
from monitor.report import encode_report, make_report, take_tally
from serving.engine.carrier import CARRIER_ID

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Reporting:
    """Reports of one engine, carried by its outputs.

    Args:
        monitor: what is reported on.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
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
            request = self._monitor.get(request_id)
            if request is not None:
                by_client.setdefault(self._clients[request_id], []).append(request)
                # Whoever withholds a reply until its prompt is judged has to hear of that.
                prompt_done = self._monitor.positions_of(request_id) >= request.num_prompt
                if prompt_done and not _ends_outside(requests.get(request_id)):
                    self._settled.add(request_id)
        if not by_client and step_ids and step_ids[0] in self._clients:
            by_client[self._clients[step_ids[0]]] = []
        tally = take_tally(self._monitor, self._seconds) if by_client else None
        if tally is not None:
            self._seconds = []
        for client, told in by_client.items():
            ended = self._ended.pop(client, [])
            report = make_report(self._monitor, told, ended, tally)
            tally = None
            carrier = EngineCoreOutput(request_id=CARRIER_ID, new_token_ids=[], routed_experts=encode_report(report))
            holder = outputs.setdefault(client, EngineCoreOutputs())
            holder.outputs = [carrier, *holder.outputs]


def _ends_outside(request: Request | None) -> bool:
    """Whether its reply may end without the engine: stop strings are found where text is made of tokens."""
    params = request.sampling_params if request is not None else None
    return params is not None and bool(params.stop)
