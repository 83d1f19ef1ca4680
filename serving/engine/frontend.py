"""The API process: take reports out of the output stream, sign requests, and show decisions as OpenAI shows them.

It presents; it can never lower what the scheduler decided.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import structlog
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from monitor.attempt import Attempt
from monitor.audit.writer import Ticket
from monitor.canary import Failed
from monitor.events import PolicyReloaded
from monitor.exporter import Exporter
from monitor.outcome import HandledRule, Outcome
from monitor.policy import Plan
from monitor.rollout import Subjects
from probes.errors import TelltaleError
from serving.deployment import Deployment
from serving.engine.carrier import take_reports
from serving.engine.ledger import Ending, Ledger
from serving.engine.records import Record, Records
from serving.engine.salts import salt_of
from serving.engine.steer_request import SteerRequestError, asked_steers
from serving.engine.trust import EXTRA_KEY, TrustedData, seal
from serving.engine.turns import Turns
from serving.hold import Reply
from serving.origin import Origin, current_origin

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestState

log = structlog.get_logger(__name__)

CONTENT_FILTER = "content_filter"
ABORTED = "abort"
"""vLLM's finish reason of a request whose client has left."""

RECORD = "telltale"
"""Attribute of vLLM's ``CompletionOutput`` that points to the request's record."""


class UnmonitoredError(TelltaleError, RuntimeError):
    """The engine produced tokens that no monitor has reported on."""


class Frontend:
    """State of one API process. Created by the plug-in, filled in once the engine's configuration is known.

    Attributes:
        questions: ids under which our own process asks what the model makes of a text.
    """

    def __init__(self) -> None:
        self.questions: set[str] = set()
        self._deployment: Deployment | None = None
        self._records: Records | None = None
        self._exporter: Exporter | None = None
        self._ledger: Ledger | None = None
        self._origins: WeakValueDictionary[str, Origin] = WeakValueDictionary()
        self._turns = Turns()
        self._canaries: dict[str, str] = {}
        self._rereads: dict[str, tuple[int, ...]] = {}
        self._reread_ids: dict[str, str] = {}

    def configure(self, deployment: Deployment) -> None:
        """The engine that this process serves; vLLM configures it more than once, later calls change nothing."""
        if self._deployment is None:
            self._deployment = deployment
            self._records = Records(deployment.plan)

    def hold(self, plans: Mapping[str, Plan]) -> None:
        """Which plans the engine may report on from now on, by their digests."""
        if self._records is not None:
            self._records.hold(plans)
        if self._exporter is not None:
            self._exporter.hold(plans)

    def adopt(self, deployment: Deployment) -> None:
        """Another policy is in force: requests that come from now on are signed under it."""
        self._deployment = deployment
        if self._exporter is not None:
            self._exporter.adopt(deployment.plan)

    def policy_reloaded(self, event: PolicyReloaded) -> None:
        """The server was given a policy."""
        if self._exporter is not None:
            self._exporter.reloaded(event.outcome)
        if self._ledger is not None:
            self._ledger.policy_reloaded(event)

    def export_to(self, exporter: Exporter) -> None:
        """Count reports from now on."""
        self._exporter = exporter

    def enter_into(self, ledger: Ledger) -> None:
        """Make events of what ends from now on."""
        self._ledger = ledger

    def abandon(self) -> None:
        """The engine has ended, or this process does: enter the requests that were under way as far as they came."""
        if self._ledger is not None and self._records is not None:
            self._enter_left(self._ledger, self._records.take_all())

    def canary_failed(self, failure: Failed) -> None:
        """A round of canaries of this process has not passed."""
        if self._ledger is not None:
            self._ledger.canary_failed(failure)

    @property
    def deployment(self) -> Deployment:
        """What the engine runs on.

        Raises:
            UnmonitoredError: no engine configuration was made in this process.
        """
        if self._deployment is None:
            raise UnmonitoredError("this process has no monitored engine: start it with telltale serve")
        return self._deployment

    def plan_of(self, origin: Origin) -> Plan:
        """What a request is judged by: what was in force when it came; else what is now."""
        return origin.plan or self.deployment.plan

    def asked_steers(self, extra: Mapping[str, Any]) -> dict[str, float]:
        """What a client's ``vllm_xargs`` ask for: by a steer's name, the share of its strength.

        Raises:
            SteerRequestError: it may not be asked for.
        """
        plan, named = self.plan_of(current_origin()), current_origin().caller.policy
        number = next((number for number, policy in enumerate(plan.policies) if policy.name == named), 0)
        return asked_steers(extra, plan, number)

    def begin_canary(self, request_id: str, plan: str | None = None) -> None:
        """The request that our own process is about to send under this id is a canary.

        Args:
            request_id: its own.
            plan: digest of the one that it is to prove; the one that runs if left out.
        """
        self._canaries[request_id] = plan or self.deployment.plan.digest

    def end_canary(self, request_id: str) -> None:
        """It has ended."""
        self._canaries.pop(request_id, None)

    def begin_reread(self, request_id: str, positions: Sequence[int]) -> None:
        """The request that our own process is about to send under this id reads a flagged one again.

        Args:
            request_id: as it is sent.
            positions: whose whole rows are wanted.
        """
        self._rereads[request_id] = tuple(positions)

    def reread_id(self, request_id: str) -> str:
        """What the engine calls it, once it was sent."""
        return self._reread_ids[request_id]

    def end_reread(self, request_id: str) -> None:
        """It has ended."""
        self._rereads.pop(request_id, None)
        self._reread_ids.pop(request_id, None)

    def record(self, request_id: str) -> Record | None:
        """What is known of a request so far; None before the engine has reported on it."""
        return self._records.get(request_id) if self._records is not None else None

    def entered_as(self, rule: HandledRule, outcome: Outcome) -> Ticket | None:
        """A rule was carried out behind the engine: count it, and enter it into the audit trail.

        Returns: the ticket that the response has to wait for, if any.
        """
        if self._exporter is not None:
            self._exporter.handled(rule, outcome)
        return self._ledger.handled(rule, outcome) if self._ledger is not None else None

    def sign(self, request: EngineCoreRequest) -> None:
        """Put our data into a request whose engine id has just been assigned.

        Raises:
            VLLMValidationError: the client tried to set it, or asks for what cannot be monitored.
        """
        params = request.sampling_params
        if params is None:
            raise VLLMValidationError("telltale: only generation is monitored; pooling requests are refused")
        if request.resumable:
            raise VLLMValidationError("telltale: streaming input is not monitored and is refused")
        if request.prompt_embeds is not None:
            raise VLLMValidationError("telltale: prompt embeddings have no tokens to report on and are refused")
        extra = dict(params.extra_args or {})
        if any(str(key).lower().startswith(EXTRA_KEY) for key in extra):
            raise VLLMValidationError(
                f"the key {EXTRA_KEY!r} in extra_args and vllm_xargs is reserved for the server", parameter="vllm_xargs"
            )
        try:
            steers = self.asked_steers(extra)
        except SteerRequestError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        if request.external_req_id in self._rereads:
            self._reread_ids[request.external_req_id] = request.request_id
        origin = current_origin()
        hold = origin.hold if origin.hold is not None and origin.hold.is_open else None
        if self._ledger is not None or hold is not None:
            self._origins[request.request_id] = origin
        subject = hold.sign(request.request_id, params.n) if hold is not None else request.request_id
        # A judge's question is our own, although a user's request is what it is about.
        sitting = origin.sitting if request.external_req_id not in self.questions else None
        # A second attempt, and what only says a refusal, are no further requests of the session.
        if sitting is not None and (hold is None or (hold.attempt is Attempt.FIRST and hold.refusal is None)):
            self._turns.begin(request.request_id, params.n, sitting)
        request.cache_salt = salt_of(origin.caller.tenant, request.cache_salt)
        prompt = origin.prompt_of(request.prompt_token_ids or ())
        extra[EXTRA_KEY] = seal(
            TrustedData(
                policy=origin.caller.policy,
                fmt=origin.fmt,
                prompt=prompt,
                canary=request.external_req_id in self._canaries,
                reread=self._rereads.get(request.external_req_id),
                steers={**steers, **(hold.steers if hold is not None else {})},
                subjects=Subjects(origin.caller.tenant, origin.caller.session, subject),
                imposed=sitting.imposed if sitting is not None else (),
                plan=self._canaries.get(request.external_req_id, self.plan_of(origin).digest),
                attempt=hold.attempt if hold is not None else Attempt.UNHELD,
                refusal=hold.refusal if hold is not None else None,
                judge=request.external_req_id in self.questions,
            ),
            request.request_id,
        )
        params.extra_args = extra

    def take_out(self, outputs: Sequence[EngineCoreOutput]) -> list[EngineCoreOutput]:
        """Take the reports out of a step's outputs and note them."""
        began = time.perf_counter()
        reports, rest = take_reports(outputs)
        left = self._records.take_in(*reports) if self._records is not None and reports else {}
        self._turns.left(left)
        if self._ledger is not None:
            self._enter_left(self._ledger, left)
        for report in reports:
            if self._ledger is not None and report.tally is not None and report.tally.gaps:
                self._ledger.gaps(report.tally.gaps)
            if self._exporter is not None:
                self._exporter.record(report)
        if reports and self._exporter is not None:
            self._exporter.took(time.perf_counter() - began)
        return rest

    def dress(self, state: RequestState, output: CompletionOutput) -> CompletionOutput:
        """Point an output to its record; of a blocked request, say so in OpenAI's words.

        Raises:
            UnmonitoredError: there are tokens of this request, the engine has not reported on it.
        """
        own = (self._canaries, self._rereads, self.questions)
        if any(state.external_req_id in known for known in own):
            return output  # the engine says what came of it when it is asked
        tokens = state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0
        record = self._records.get(state.request_id) if self._records is not None else None
        if record is None and output.finish_reason == ABORTED and not tokens:
            return output  # its client left before the engine had said anything of it
        if record is None:
            raise UnmonitoredError(
                f"request {state.request_id}: the engine sent tokens, but its scheduler no report about them. The "
                "plug-in is missing in the engine's process. Nothing is served unmonitored."
            )
        setattr(output, RECORD, record)
        if output.finish_reason is None:
            return output
        record.close(state.prompt_len + tokens)
        origin = self._origin_of(state)
        hold = origin.hold if origin is not None else None
        record.withheld = hold is not None and hold.is_open
        if hold is not None:
            written = state.detokenizer.output_token_ids if state.detokenizer is not None else ()
            hold.replies[state.request_id] = Reply(
                state.request_id, record, state.prompt_token_ids or (), list(written)
            )
        if output.finish_reason != ABORTED:  # of those the engine has not said the last word
            self._turns.ended(state.request_id, record)
        text = record.blocked_text
        if text is not None:
            output.finish_reason, output.stop_reason = CONTENT_FILTER, None
            if record.blocks_request and state.parent_req is not None:
                withhold(state.parent_req.output_aggregator, record)
        self._enter(state, output, record)
        if text is None:
            return output
        if state.output_kind is not RequestOutputKind.DELTA:
            output.text = text
        else:
            output.text += refusal_delta(text, follows_text=tokens > 0)
        return output

    def _enter(self, state: RequestState, output: CompletionOutput, record: Record) -> None:
        """Make an event of the end of a request; its response waits for the ticket."""
        if self._ledger is None or record.entered or not record.counted:
            return
        parent, origin = state.parent_req, self._origin_of(state)
        ending = Ending(
            state.request_id,
            parent.external_req_id if parent is not None else state.external_req_id,
            prompt=state.prompt_token_ids or (),
            reply=list(state.detokenizer.output_token_ids) if state.detokenizer is not None else (),
            finish_reason=output.finish_reason,
            tenant=(origin.caller.tenant or None) if origin is not None else None,
            tell=origin.tell if origin is not None else None,
        )
        ticket = self._ledger.ended(record, ending)
        if ticket is not None and origin is not None:
            origin.tickets.append(ticket)

    def _origin_of(self, state: RequestState) -> Origin | None:
        parent = state.parent_req
        return self._origins.get(parent.request_id if parent is not None else state.request_id)

    @staticmethod
    def _enter_left(ledger: Ledger, left: Mapping[str, Record]) -> None:
        for request_id, record in left.items():
            # vLLM made no last output for it: its client left before it had begun, or the engine ended.
            if not record.entered and record.counted:
                ledger.ended(record, Ending(request_id))


def withhold(outputs: Sequence[CompletionOutput | None], blocked: Record) -> None:
    """A block of all choices: those that have ended before it, and wait for the others, are not sent either.

    Args:
        outputs: of the choices, None where they have not ended.
        blocked: the record of the choice that made the rule fire.
    """
    for output in outputs:
        record = record_of(output)
        if output is None or record is None or record.blocked_text is not None or blocked.blocked_text is None:
            continue
        record.decided = blocked.decided
        output.text = blocked.blocked_text
        output.finish_reason, output.stop_reason = CONTENT_FILTER, None


def refusal_delta(text: str, *, follows_text: bool) -> str:
    """The refusal as the last piece of a stream: set off from what was streamed before."""
    return f"\n\n{text}" if follows_text else text


def record_of(output: Any) -> Record | None:
    """The record that an output of vLLM points to."""
    record = getattr(output, RECORD, None)
    return record if isinstance(record, Record) else None
