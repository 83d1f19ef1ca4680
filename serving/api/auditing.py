"""Opens the audit trail of an API process, as the policy file says."""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

import serving
from monitor.audit.checkpoint import CheckpointFile
from monitor.audit.key import load_key
from monitor.audit.metrics import AuditMetrics
from monitor.audit.settings import AuditSettings, Durability
from monitor.audit.store import open_store
from monitor.audit.writer import AuditWriter
from monitor.events import Started
from serving.deployment import Deployment
from serving.engine.ledger import artifacts_of

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Audit:
    """The audit trail of a running API process.

    Attributes:
        settings: with absolute paths.
        writer: its chain.
        metrics: what Prometheus is told.
    """

    settings: AuditSettings
    writer: AuditWriter
    metrics: AuditMetrics

    @property
    def is_failing(self) -> bool:
        """Whether nothing may be released because the trail cannot be written."""
        return self.settings.blocks_on_error and self.writer.is_failing


def open_audit(deployment: Deployment, registry: CollectorRegistry) -> Audit | None:
    """Begin this process's chain; None if the policy file has no ``audit``.

    Args:
        deployment: what runs.
        registry: for metrics.
    Raises:
        monitor.audit.errors.AuditError: the store or the key cannot be used.
    """
    given = deployment.file.config.audit
    if given is None:
        return None
    settings = given.resolved(deployment.file.path.parent)
    key = load_key(Path(settings.key_file or ""), make=True)
    durable = settings.durability is Durability.BEFORE_RELEASE
    metrics = AuditMetrics(registry)
    sink = CheckpointFile(Path(settings.checkpoints)) if settings.checkpoints is not None else None
    writer = AuditWriter(open_store(settings.url, durable=durable, make=True), key, settings, metrics, sink)
    plan = deployment.plan
    artifacts = {name: digest for policy in plan.policies for name, digest in artifacts_of(plan, policy).items()}
    writer.start(
        Started(
            program=serving.__version__,
            plan=plan.digest,
            model=deployment.model.id,
            model_digest=deployment.model.weight_digest,
            policies=tuple(policy.name for policy in plan.policies),
            artifacts=artifacts,
            text=settings.text.value,
            durability=settings.durability.value,
        )
    )
    atexit.register(writer.close)
    log.info("audit", chain=writer.writer[:8], key=key.key_id, text=settings.text.value, durable=durable)
    return Audit(settings, writer, metrics)
