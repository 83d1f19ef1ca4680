"""What the API processes are told of a step: each hears of its own requests, and one of them takes the tally."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from monitor.generations import Generations
from monitor.monitor import Ended
from monitor.report import StepReport, TallyReport, encode_report, make_report, take_tally
from monitor.request import Request as Admitted
from monitor.types import Phase
from serving.engine.carrier import CARRIER_ID

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from serving.engine.readouts import WorkerReadouts


class Reporting:
    """Reports of one engine, carried by its outputs.

    Args:
        monitors: what is reported on.
        held: tells how many outputs are held back.
    """

    def __init__(self, monitors: Generations, held: Callable[[], int] = lambda: 0) -> None:
        self._monitors = monitors
        self._held = held
        self._clients: dict[str, int] = {}
        self._ended: dict[int, list[Ended]] = {}
        # Requests that the API process knows of and need not hear of again before they end.
        self._settled: set[str] = set()
        self._seconds: list[float] = []
        self._overhead: defaultdict[str, list[float]] = defaultdict(list)
        self._judged = 0.0

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

    def took(self, seconds: float, readouts: WorkerReadouts | None = None) -> None:
        """A step has been judged in so many seconds.

        Args:
            seconds: from its readouts to its decisions.
            readouts: they say what they cost before; None if they were lost.
        """
        self._seconds.append(seconds)
        judged = self._monitors.policy_seconds
        policy, self._judged = judged - self._judged, judged
        self._overhead[Phase.POLICY].append(policy)
        self._overhead[Phase.OBSERVE].append(max(0.0, seconds - policy))
        if readouts is not None:
            self._overhead[Phase.TRANSFER].append(readouts.seconds)
            if readouts.tap_seconds is not None:
                self._overhead[Phase.TAP].append(readouts.tap_seconds)

    def attach(
        self, outputs: dict[int, EngineCoreOutputs], step_ids: Sequence[str], requests: Mapping[str, Request]
    ) -> None:
        """Put reports in front of a step's outputs.

        Args:
            outputs: by client; changed in place.
            step_ids: requests of the step.
            requests: vLLM's, those that live.
        """
        began = time.perf_counter()
        by_client: dict[int, list[Any]] = {client: [] for client in self._ended}
        for request_id in step_ids:
            if request_id in self._settled:
                continue
            request = self._monitors.get(request_id)
            if request is not None:
                by_client.setdefault(self._clients[request_id], []).append(request)
                # Whoever withholds a reply until its prompt is judged has to hear of that.
                prompt_done = self._monitors.positions_of(request_id) >= request.num_prompt
                if prompt_done and not _ends_outside(requests.get(request_id)):
                    self._settled.add(request_id)
        if not by_client and step_ids and step_ids[0] in self._clients:
            by_client[self._clients[step_ids[0]]] = []
        tally = None
        if by_client:
            tally = take_tally(self._monitors, self._seconds, self._overhead, self._held())
            self._seconds, self._overhead, self._judged = [], defaultdict(list), 0.0
        for client, told in by_client.items():
            carriers = []
            for report in self._reports(told, self._ended.pop(client, []), tally):
                tally = None
                data = encode_report(report)
                carriers.append(EngineCoreOutput(request_id=CARRIER_ID, new_token_ids=[], routed_experts=data))
            holder = outputs.setdefault(client, EngineCoreOutputs())
            holder.outputs = [*carriers, *holder.outputs]
        if step_ids:
            # Told with the next step: this one's report is made.
            self._overhead[Phase.REPORT].append(time.perf_counter() - began)

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
