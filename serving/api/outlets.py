"""Opens all that the events of an API process go to: the audit trail, the sinks; and what makes the events."""

from __future__ import annotations

import atexit
import copy
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from monitor.audit.redaction import KeptTexts
from monitor.audit.settings import AuditSettings
from monitor.outlet import Outlet, Outlets
from monitor.sinks.bound import bound_by
from monitor.sinks.metrics import SinkMetrics
from monitor.sinks.sinks import Sinks
from serving.api.auditing import Audit
from serving.deployment import Deployment
from serving.engine.ledger import Ledger

log = structlog.get_logger(__name__)


def open_ledger(
    deployment: Deployment, tokenizer: Any, *, audit: Audit | None, sinks: Sinks | None, traced: bool
) -> Ledger | None:
    """What makes events; None if nobody wants any.

    Args:
        deployment: what runs.
        tokenizer: of the engine; copied, because its thread is not ours.
        audit: the audit trail, if there is one.
        sinks: those of the policy file, if it has any.
        traced: whether traces say what was decided.
    Raises:
        monitor.audit.errors.AuditError: the redaction hook cannot be used.
    """
    outlets: list[Outlet] = [audit.writer] if audit is not None else []
    if sinks is not None:
        outlets.append(sinks)
    if not outlets and not traced:
        return None
    texts = KeptTexts(audit.settings if audit is not None else AuditSettings())
    return Ledger(deployment.plan, Outlets(outlets), texts, _decoder(tokenizer))


def open_sinks(deployment: Deployment, registry: CollectorRegistry) -> Sinks | None:
    """The sinks of the policy file; None if it has none.

    Args:
        deployment: what runs.
        registry: for their metrics.
    Raises:
        monitor.sinks.errors.SinkError: one cannot be opened.
    """
    entries = [entry.resolved(deployment.file.path.parent) for entry in deployment.file.config.sinks]
    if not entries:
        return None
    sinks = Sinks(entries, os.environ, SinkMetrics(registry, [entry.name for entry in entries]))
    sinks.bind(bound_by(deployment.plan.alerts))
    atexit.register(sinks.close)
    log.info("sinks", names=[entry.name for entry in entries])
    return sinks


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    own, alone = copy.deepcopy(tokenizer), threading.Lock()

    def decode(tokens: Sequence[int]) -> str:
        # The audit trail and each sink have a thread, and a tokenizer serves one at a time.
        with alone:
            return str(own.decode(list(tokens)))

    return decode
