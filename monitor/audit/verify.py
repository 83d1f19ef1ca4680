"""Proves an audit trail: every record signed, in its place, and none missing; or says which is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from monitor.audit.checkpoint import Checkpoint
from monitor.audit.errors import DamagedError
from monitor.audit.key import AuditKey
from monitor.audit.record import ORIGIN, AuditRecord
from monitor.audit.store import Store, Stored
from monitor.events import Erased, Pruned, PrunedChain, Started

_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was written.

    Attributes:
        writer: of the chain.
        seq: of the record; None if it is about the chain.
        what: in words.
    """

    writer: str
    seq: int | None
    what: str

    def __str__(self) -> str:
        place = f" record {self.seq}" if self.seq is not None else ""
        return f"chain {self.writer[:8]}{place}: {self.what}"


@dataclass(slots=True)
class Proof:
    """What was found.

    Attributes:
        findings: in the order of the chains; empty if all holds.
        records: that were read, by chain.
        erased: records whose content was erased on record.
        checkpoints: that were compared.
    """

    findings: list[Finding] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=dict)
    erased: int = 0
    checkpoints: int = 0

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class _End:
    """Somewhere it is signed that a chain had this record at that time."""

    said_by: str
    time: datetime
    writer: str
    seq: int
    mac: str


@dataclass(slots=True)
class _Notes:
    """What signed records say about others, gathered while they are read."""

    ends: list[_End] = field(default_factory=list)
    begins: dict[str, list[PrunedChain]] = field(default_factory=dict)
    before: datetime = _NEVER
    erased: set[tuple[str, int]] = field(default_factory=set)
    bare: list[tuple[str, int]] = field(default_factory=list)
    full: set[tuple[str, int]] = field(default_factory=set)
    first: dict[str, AuditRecord] = field(default_factory=dict)

    def take(self, stored: Stored) -> None:
        event, record = stored.event, stored.record
        place = (record.writer, record.seq)
        if record.commitment and record.content is None:
            self.bare.append(place)
        elif record.commitment:
            self.full.add(place)
        match event:
            case Started():
                by = f"the start of chain {record.writer[:8]}"
                self.ends += [_End(by, event.time, head.writer, head.seq, head.mac) for head in event.heads]
            case Pruned():
                self.before = max(self.before, event.before)
                for chain in event.chains:
                    self.begins.setdefault(chain.writer, []).append(chain)
            case Erased():
                self.erased |= {(item.writer, item.seq) for item in event.records}
            case _:
                pass


def verify(store: Store, keys: Sequence[AuditKey], checkpoints: Iterable[Checkpoint] = ()) -> Proof:
    """Read a whole store and compare it with what was signed.

    What it cannot find: that the newest records of a chain were cut off, where no checkpoint and no later chain names
    them; and whatever somebody did who has the key.

    Args:
        store: to read.
        keys: that records may be signed with.
        checkpoints: what their sink has kept.
    Raises:
        AuditStoreError: the store cannot be read.
    """
    known = {key.key_id: key for key in keys}
    proof, notes = Proof(), _Notes()
    for writer in store.writers():
        proof.records[writer] = 0
        try:
            _read_chain(store, writer, known, proof, notes)
        except DamagedError as error:
            proof.findings.append(Finding(writer, None, f"cannot be read on: {error}"))
    _compare_beginnings(proof, notes)
    _compare_contents(proof, notes)
    for checkpoint in checkpoints:
        proof.checkpoints += 1
        key = known.get(checkpoint.key_id)
        if key is None or not checkpoint.is_signed(key):
            proof.findings.append(Finding(checkpoint.writer, checkpoint.seq, "its checkpoint is not signed by our key"))
            continue
        said = datetime.fromtimestamp(checkpoint.time, UTC)
        notes.ends.append(_End("a checkpoint", said, checkpoint.writer, checkpoint.seq, checkpoint.record))
    _compare_ends(store, proof, notes)
    return proof


def _read_chain(store: Store, writer: str, keys: Mapping[str, AuditKey], proof: Proof, notes: _Notes) -> None:
    before: AuditRecord | None = None
    for stored in store.read(writer):
        record = stored.record
        proof.records[writer] += 1
        wrong = _wrong_with(stored, keys) or (_out_of_place(record, before) if before is not None else "")
        if wrong:
            proof.findings.append(Finding(writer, record.seq, wrong))
        else:
            notes.take(stored)
        if before is None:
            notes.first[writer] = record
        before = record


def _wrong_with(stored: Stored, keys: Mapping[str, AuditKey]) -> str:
    record = stored.record
    key = keys.get(record.key_id)
    if key is None:
        return f"it is signed with the key {record.key_id!r}; keys given: {', '.join(keys)}"
    if not record.is_signed(key):
        return "it was altered: its signature is wrong"
    if (record.salt is None) != (record.content is None):
        return "half of its content was removed"
    if record.content is not None and not record.holds_its_content():
        return "its content was altered"
    return stored.wrong


def _out_of_place(record: AuditRecord, before: AuditRecord) -> str:
    if record.seq <= before.seq:
        return f"it stands behind record {before.seq}"
    if record.seq > before.seq + 1:
        last = record.seq - 1
        return (
            f"records {before.seq + 1} to {last} are missing" if last > before.seq + 1 else f"record {last} is missing"
        )
    if record.prev != before.mac:
        return "it follows another record than the one before it"
    return ""


def _compare_beginnings(proof: Proof, notes: _Notes) -> None:
    for writer, first in notes.first.items():
        if first.seq == 0:
            if first.prev != ORIGIN:
                proof.findings.append(Finding(writer, 0, "it claims to follow another record"))
            continue
        begins = notes.begins.get(writer, [])
        if not any(chain.below == first.seq and chain.mac == first.prev for chain in begins):
            proof.findings.append(
                Finding(writer, first.seq, f"records 0 to {first.seq - 1} are missing, and no pruning is on record")
            )


def _compare_contents(proof: Proof, notes: _Notes) -> None:
    for place in notes.bare:
        if place in notes.erased:
            proof.erased += 1
        else:
            proof.findings.append(Finding(*place, "its content is missing, and no erasure is on record"))
    proof.findings += [
        Finding(*place, "its content was to be erased and still stands there; run the deletion again")
        for place in sorted(notes.full & notes.erased)
    ]


def _compare_ends(store: Store, proof: Proof, notes: _Notes) -> None:
    for end in notes.ends:
        below = max((chain.below for chain in notes.begins.get(end.writer, ())), default=0)
        if end.seq < below:
            continue
        try:
            found = next(store.read(end.writer, after=end.seq - 1), None)
        except DamagedError:
            continue  # it has been told
        if found is None:
            if end.time > notes.before:
                what = f"it and whatever followed it is missing; {end.said_by} names it"
                proof.findings.append(Finding(end.writer, end.seq, what))
        elif found.record.seq == end.seq and found.record.mac != end.mac:
            proof.findings.append(Finding(end.writer, end.seq, f"it is another one than {end.said_by} names"))
