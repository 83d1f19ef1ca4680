"""What may go wrong with an audit trail."""

from __future__ import annotations

from probes.errors import TelltaleError


class AuditError(TelltaleError):
    """The audit trail cannot be used as asked."""


class AuditStoreError(AuditError, OSError):
    """The store cannot be opened, written or read at present."""


class DamagedError(AuditError, ValueError):
    """What stands in the store is no record."""
