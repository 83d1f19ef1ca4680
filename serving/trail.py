"""The audit trail as commands meet it: found by the policy file, opened, written to in a chain of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import serving
from monitor.audit.errors import AuditError
from monitor.audit.key import AuditKey, load_key, read_key
from monitor.audit.record import Chain
from monitor.audit.redaction import KeptTexts
from monitor.audit.settings import AuditSettings
from monitor.audit.store import Store, Stored, open_store
from monitor.audit.writer import newest_heads
from monitor.events import (
    CanaryFailed,
    Content,
    ConversationFired,
    Decision,
    Dropped,
    Explanation,
    GapSeen,
    ProbingSuspected,
    Started,
    Stopped,
)
from monitor.types import Gap
from monitor.yaml_file import read_policy_file

_SHOWN_LATENTS = 3


@dataclass(frozen=True, slots=True)
class Trail:
    """An audit trail that was opened.

    Attributes:
        store: its records.
        key: to sign and to verify with.
        checkpoints: file of its checkpoints, if it has one.
        retention_days: after which records go, if that is set.
    """

    store: Store
    key: AuditKey
    checkpoints: Path | None
    retention_days: int | None

    @contextmanager
    def chain(self) -> Iterator[Chain]:
        """A chain for what a command does; it is ended with the block.

        Raises:
            AuditStoreError: the store cannot be written.
        """
        chain = Chain(self.key)
        self.store.append([chain.add(Started(program=serving.__version__, heads=newest_heads(self.store)), None)])
        yield chain
        self.store.append([chain.add(Stopped(), None)])


def require_trail(settings: AuditSettings) -> None:
    """Fail before a model is loaded if the trail cannot be written; a new store and key are made here.

    Args:
        settings: with absolute paths.
    Raises:
        AuditError: the store, the key or the redaction hook cannot be used.
    """
    load_key(Path(settings.key_file or ""), make=True)
    KeptTexts(settings)
    open_store(settings.url, make=True).close()


@contextmanager
def open_trail(policy: Path | None, *, url: str | None, key_file: Path | None) -> Iterator[Trail]:
    """The trail of a policy file, or at a URL.

    Raises:
        AuditError: there is none, or no key.
        PolicyError: the policy file is wrong.
    """
    settings = _settings(policy, url)
    if key_file is not None:
        key = read_key(key_file)
    elif policy is None:
        # Only the environment is left.
        key = load_key(Path("audit.key"), make=False)
    else:
        key = load_key(Path(settings.key_file or ""), make=False)
    store = open_store(settings.url)
    try:
        kept = Path(settings.checkpoints) if settings.checkpoints is not None else None
        yield Trail(store, key, kept, settings.retention_days)
    finally:
        store.close()


@contextmanager
def open_reader(policy: Path | None, *, url: str | None) -> Iterator[Store]:
    """The store alone: to read takes no key.

    Raises:
        AuditError: there is none.
        PolicyError: the policy file is wrong.
    """
    store = open_store(_settings(policy, url).url)
    try:
        yield store
    finally:
        store.close()


def show_event(stored: Stored) -> str:
    """An event as one line for people.

    Raises:
        monitor.audit.errors.DamagedError: it is damaged.
    """
    event, content = stored.event, stored.content
    said = ""
    match event:
        case Decision():
            fired = sorted({verdict.detector for verdict in event.verdicts if verdict.fired})
            parts = [event.action.value]
            parts += [f"by {event.rule}"] if event.rule is not None else []
            parts += [f"policy {event.policy}", f"{event.coverage.scored}/{event.coverage.positions} scored"]
            parts += [f"fired {', '.join(fired)}"] if fired else []
            parts += [f"gaps {_counts(event.coverage.gaps)}"] if event.coverage.gaps else []
            parts += [content.client_request_id or content.request_id] if content is not None else ["(erased)"]
            said = "  ".join(parts)
        case ConversationFired():
            said = f"{event.action.value} ({event.mode.value}) by {event.rule}  policy {event.policy}"
        case ProbingSuspected():
            said = f"{event.detector}: {event.near} of {event.requests} near its threshold  policy {event.policy}"
        case Explanation():
            said = _explained(event, content)
        case GapSeen():
            said = _counts(event.gaps)
        case CanaryFailed():
            said = f"{event.reason.value}: {event.detail}"
        case Dropped():
            said = f"{event.count} events, {event.reason}"
        case Started():
            said = f"telltale {event.program}" + (f", plan {event.plan[:12]}" if event.plan is not None else "")
        case _:
            pass
    return f"{event.time:%Y-%m-%d %H:%M:%S}  {event.kind:<8}  {said}".rstrip()


def _explained(event: Explanation, content: Content | None) -> str:
    texts = content.tokens if content is not None else None
    whose = "(erased)" if content is None else content.client_request_id or content.request_id
    told = []
    for number, token in enumerate(event.tokens):
        name = f"{token.position}" if texts is None else f"{token.position} {texts[number]!r}"
        latents = ", ".join(f"{seen.latent} ({seen.activity:.3g})" for seen in token.latents[:_SHOWN_LATENTS])
        told.append(f"{name}: {latents or 'no latent'}")
    return "  ".join([event.rule, event.detector, event.sae, *told, whose])


def _counts(gaps: Mapping[Gap, int]) -> str:
    return ", ".join(f"{reason.value} {count}" for reason, count in gaps.items())


def _settings(policy: Path | None, url: str | None) -> AuditSettings:
    if policy is None:
        if url is None:
            raise AuditError("give --policy FILE, whose 'audit' says where the trail is, or --url URL.")
        return AuditSettings(url=url).resolved(Path.cwd())
    given = read_policy_file(policy).config.audit
    if given is None and url is None:
        raise AuditError(
            f"{policy}: has no 'audit', so that no trail is written. Give --url URL, or add 'audit: {{}}'."
        )
    settings = given or AuditSettings()
    return settings.model_copy(update={"url": url} if url is not None else {}).resolved(policy.absolute().parent)
