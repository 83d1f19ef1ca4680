"""Whom a withheld reply is turned to, and where it is told what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from monitor.compiled import CompiledRule
from monitor.outcome import HandledRule, Outcome
from serving.api.opinions import Opinions
from serving.api.upstream import Upstream
from serving.engine.frontend import Frontend
from serving.hold import Reply
from serving.origin import current_origin


@dataclass(frozen=True, slots=True)
class Desk:
    """What the layer that withholds replies works with.

    Attributes:
        opinions: second ones.
        upstream: other servers.
        frontend: of this process.
    """

    opinions: Opinions
    upstream: Upstream
    frontend: Frontend

    def tell(self, rule: CompiledRule, reply: Reply, outcome: Outcome) -> str:
        """Count and enter what came of a rule; the response waits until it is stored.

        Returns: the same for the client.
        """
        request_id = reply.request_id
        handled = HandledRule(reply.record.policy_name, rule.name, rule.action, request_id)
        ticket = self.frontend.entered_as(handled, outcome)
        if ticket is not None:
            current_origin().tickets.append(ticket)
        return f"action={rule.action.value}; rule={rule.name}; outcome={outcome.value}"
