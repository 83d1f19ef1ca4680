"""Texts that an audit trail keeps: which, and what a redaction hook leaves of them. A hook that fails keeps nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module

import structlog

from monitor.audit.errors import AuditError
from monitor.audit.settings import AuditSettings, TextKept

log = structlog.get_logger(__name__)

Redactor = Callable[[str], str]
_PATTERNS = (
    ("[email]", re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")),
    ("[iban]", re.compile(r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{4}){2,7}(?:[ ]?[A-Z0-9]{1,4})?\b")),
    ("[ip]", re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")),
    # Card numbers, telephone numbers, dates and other long numbers alike: too much is better than too little.
    ("[number]", re.compile(r"(?<!\w)\+?\d(?:[ ()/.-]{0,2}\d){5,}(?!\w)")),
)


def personal_data(text: str) -> str:
    """The redaction that ships: mail and IP addresses, IBANs and long numbers are replaced by what they were.

    Names and street addresses stay: no pattern finds them. Whoever must not keep those brings a hook of their own.
    """
    for name, pattern in _PATTERNS:
        text = pattern.sub(name, text)
    return text


class RedactionError(AuditError, ValueError):
    """A redaction hook did not give back a text."""


class KeptTexts:
    """Decides which texts of a request are stored.

    Args:
        settings: what is kept, and the hook.
    Raises:
        AuditError: the hook cannot be imported or fails on an empty text.
    """

    def __init__(self, settings: AuditSettings) -> None:
        self._kept = settings.text
        self._redact = _load(settings.redact) if settings.text is TextKept.REDACTED else None

    def keeps(self, *, flagged: bool) -> bool:
        """Whether anything is kept of a request on which a rule has, or has not, fired."""
        if self._kept is TextKept.FLAGGED:
            return flagged
        return self._kept is not TextKept.NONE

    @property
    def keeps_pieces(self) -> bool:
        """Whether single tokens of a flagged request may be kept: not where a hook has to see the text whole."""
        return self._kept in {TextKept.FLAGGED, TextKept.FULL}

    def redacted(self, text: str) -> str:
        """What may be stored of a text that is kept.

        Raises:
            RedactionError: the hook failed: nothing may.
        """
        if self._redact is None:
            return text
        try:
            found = self._redact(text)
        # The operator's code: whatever it raises, the text must not be stored, and the event must.
        except Exception as error:
            raise RedactionError(f"the redaction hook raised {type(error).__name__}") from error
        if not isinstance(found, str):
            raise RedactionError(f"the redaction hook returned {type(found).__name__}, not str")
        return found


def _load(name: str) -> Redactor:
    module, _, function = name.partition(":")
    advice = "Name a function that takes a text and returns one: 'redact: MODULE:FUNCTION'."
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise AuditError(f"audit.redact: {name!r} cannot be imported ({error}). {advice}") from error
    if not callable(found):
        raise AuditError(f"audit.redact: {name!r} is no function. {advice}")
    redactor: Redactor = found
    return redactor
