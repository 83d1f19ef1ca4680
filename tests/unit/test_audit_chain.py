"""The chain of an audit trail: whatever is changed, taken out, moved or put in is found and named; erasing is not."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from monitor.audit.checkpoint import CheckpointFile, Checkpoints, read_checkpoints
from monitor.audit.erasure import erase
from monitor.audit.errors import AuditError, AuditStoreError, DamagedError
from monitor.audit.key import KEY_VARIABLE, load_key, read_key
from monitor.audit.record import Chain
from monitor.audit.retention import expired
from monitor.audit.store import Selector, Store, open_store
from monitor.audit.verify import Proof, verify
from monitor.events import Head, Started, canonical, parse_event
from tests.unit.audit_trail import KEY, OTHER_KEY, SCHEMES, chain_of, content, decision, new_store, url_of

COUNT = 6
TEXTS = ("prev", "key_id", "event", "commitment", "mac", "salt", "content")


@pytest.fixture(params=SCHEMES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = new_store(request.param, tmp_path)
    yield made
    made.close()


def proof_of(store: Store, **more: object) -> Proof:
    return verify(store, [KEY], **more)  # type: ignore[arg-type]


def test_what_was_written_is_read(store: Store) -> None:
    chain, records = chain_of(COUNT)
    store.append(records[:3])
    store.append(records[3:])
    assert [stored.record for stored in store.read(chain.writer)] == records
    assert [stored.record.seq for stored in store.read(chain.writer, after=4)] == [5, 6, 7]
    assert store.writers() == [chain.writer]
    assert store.newest(chain.writer) == Head(writer=chain.writer, seq=7, mac=chain.newest)
    assert store.newest("0" * 32) is None
    proof = proof_of(store)
    assert proof.holds
    assert proof.records == {chain.writer: COUNT + 2}


def test_a_batch_whose_commit_was_answered_by_nobody_may_be_sent_again(tmp_path: Path) -> None:
    store = new_store("sqlite", tmp_path)
    chain, records = chain_of(COUNT)
    store.append(records)
    store.append(records)
    assert proof_of(store).records == {chain.writer: COUNT + 2}
    with pytest.raises(AuditStoreError):
        store.append([replace(records[2], mac=records[3].mac)])
    store.close()


@given(record=st.integers(0, COUNT + 1), field=st.sampled_from(TEXTS), place=st.integers(0), change=st.integers(1, 94))
@settings(deadline=None, max_examples=60)
def test_a_changed_character_is_found_and_named(record: int, field: str, place: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        chain, records = chain_of(COUNT)
        damaged = records[record]
        text = getattr(damaged, field)
        if not text:
            return
        place %= len(text)
        other = chr((ord(text[place]) - 32 + change) % 95 + 32)
        changed = text[:place] + other + text[place + 1 :]
        store = new_store("sqlite", Path(folder))
        store.append(records)
        with closing(sqlite3.connect(Path(folder) / "trail.db")) as database, database:
            database.execute(f"UPDATE telltale_audit SET {field} = ? WHERE seq = ?", (changed, record))  # noqa: S608
        findings = proof_of(store).findings
        store.close()
        assert (chain.writer, record) in {(finding.writer, finding.seq) for finding in findings}


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_flipped_byte_of_a_file_is_found(data: st.DataObject) -> None:
    """Any byte of the file, its structure too, in whichever way it is changed."""
    with tempfile.TemporaryDirectory() as folder:
        chain, records = chain_of(COUNT)
        store = new_store("jsonl", Path(folder))
        store.append(records)
        erase(store, Chain(KEY), Selector.REQUEST, "chatcmpl-1")
        store.close()
        path = Path(folder) / "trail" / f"{chain.writer}.jsonl"
        whole = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(whole) - 2))
        whole[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole)
        proof = proof_of(new_store("jsonl", Path(folder)))
        line = bytes(whole[:place]).count(b"\n")
        assert {finding.writer for finding in proof.findings} == {chain.writer}
        named = [finding.seq for finding in proof.findings if finding.seq is not None]
        assert not named or line in {*named, *(number - 1 for number in named)}


@given(missing=st.sets(st.integers(0, COUNT), min_size=1, max_size=3))
@settings(deadline=None, max_examples=20)
def test_missing_records_are_found_and_named(missing: set[int]) -> None:
    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as folder:
            _, records = chain_of(COUNT)
            store = new_store(scheme, Path(folder))
            store.append([record for record in records if record.seq not in missing])
            said = " ".join(str(finding) for finding in proof_of(store).findings)
            store.close()
            runs = [number for number in sorted(missing) if number - 1 not in missing]
            assert said.count("missing") == len(runs)
            assert all(str(number) in said for number in runs)


@given(pair=st.tuples(st.integers(0, COUNT + 1), st.integers(0, COUNT + 1)).filter(lambda pair: pair[0] != pair[1]))
@settings(deadline=None, max_examples=20)
def test_swapped_records_are_found(pair: tuple[int, int]) -> None:
    first, second = sorted(pair)
    _, records = chain_of(COUNT)
    moved = list(records)
    moved[first], moved[second] = records[second], records[first]
    renumbered = [replace(record, seq=number) for number, record in enumerate(moved)]
    for scheme, swapped in (("jsonl", moved), ("jsonl", renumbered), ("sqlite", renumbered)):
        with tempfile.TemporaryDirectory() as folder:
            store = new_store(scheme, Path(folder))
            store.append(swapped)
            named = {finding.seq for finding in proof_of(store).findings}
            store.close()
            assert named & {first, second, first + 1, second + 1}


@given(place=st.integers(1, COUNT), signed=st.booleans())
@settings(deadline=None, max_examples=20)
def test_an_inserted_record_is_found(place: int, *, signed: bool) -> None:
    """Signed with another key, or a genuine record of another chain."""
    chain, records = chain_of(COUNT)
    _, others = chain_of(COUNT, key=KEY if signed else OTHER_KEY)
    forged = replace(others[place], writer=chain.writer, prev=records[place - 1].mac)
    later = [replace(record, seq=record.seq + 1) for record in records[place:]]
    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as folder:
            store = new_store(scheme, Path(folder))
            store.append([*records[:place], forged, *later])
            assert place in {finding.seq for finding in proof_of(store).findings}
            store.close()


def test_a_lost_end_is_found_by_a_later_chain_or_a_checkpoint(store: Store, tmp_path: Path) -> None:
    chain, records = chain_of(COUNT)
    store.append(records[:-3])
    assert proof_of(store).holds  # nobody has said yet that there was more
    sink = tmp_path / "checkpoints"
    checkpoints = Checkpoints(chain, CheckpointFile(sink))
    checkpoints.send()
    checkpoints.send()  # nothing new: nothing sent
    (checkpoint,) = read_checkpoints(sink)
    (finding,) = proof_of(store, checkpoints=[checkpoint]).findings
    assert (finding.writer, finding.seq) == (chain.writer, COUNT + 1)
    later = Chain(KEY)
    head = Head(writer=chain.writer, seq=COUNT + 1, mac=chain.newest)
    store.append([later.add(Started(program="test", heads=(head,)), None)])
    (finding,) = proof_of(store).findings
    assert (finding.writer, finding.seq) == (chain.writer, COUNT + 1)
    forged = replace(checkpoint, seq=2, record=records[3].mac)
    assert "not signed" in str(proof_of(store, checkpoints=[forged]).findings)


def test_a_chain_that_vanished_is_found(store: Store, tmp_path: Path) -> None:
    chain, _ = chain_of(COUNT)
    Checkpoints(chain, CheckpointFile(tmp_path / "checkpoints")).send()
    (finding,) = proof_of(store, checkpoints=read_checkpoints(tmp_path / "checkpoints")).findings
    assert finding.writer == chain.writer
    assert "missing" in finding.what


@pytest.mark.parametrize(
    ("by", "value", "gone"),
    [
        (Selector.REQUEST, "chatcmpl-2", {3}),
        (Selector.REQUEST, "chatcmpl-2-x", {3}),
        (Selector.TENANT, "acme", {2, 4, 6}),
        (Selector.TENANT, "ac", set()),
    ],
)
def test_erasing_keeps_the_chain(store: Store, tmp_path: Path, by: Selector, value: str, gone: set[int]) -> None:
    chain, records = chain_of(COUNT)
    store.append(records)
    own = Chain(KEY)
    assert {item.seq for item in erase(store, own, by, value)} == gone
    proof = proof_of(store)
    assert proof.holds
    assert proof.erased == len(gone)
    left = [stored.record for stored in store.read(chain.writer)]
    assert left == [record.erased() if record.seq in gone else record for record in records]
    said = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".db-wal")
    assert all(records[number].salt.encode() not in said for number in gone)  # type: ignore[union-attr]
    assert list(erase(store, own, by, value)) == []


def test_an_erasure_that_nobody_recorded_is_found(store: Store) -> None:
    chain, records = chain_of(COUNT)
    store.append([record.erased() if record.seq == 3 else record for record in records])
    (finding,) = proof_of(store).findings
    assert (finding.writer, finding.seq) == (chain.writer, 3)
    assert "no erasure is on record" in finding.what


def test_a_commitment_says_nothing_of_a_guessed_content() -> None:
    """The same content under two salts: two commitments, and only the right salt opens its own."""
    one, two = (Chain(KEY, "a" * 32).add(decision(), content()) for _ in range(2))
    assert one.content == two.content
    assert one.commitment != two.commitment
    assert one.holds_its_content()
    assert not replace(one, salt=two.salt).holds_its_content()


def test_what_is_old_goes_and_the_rest_still_holds(store: Store, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    old = now - timedelta(days=100)
    straddling, records = chain_of(4, times=[old, old, now, now])
    store.append(records)
    gone, past = chain_of(3, times=[old, old, old])
    store.append(past)
    Checkpoints(gone, CheckpointFile(tmp_path / "checkpoints")).send()
    if type(store).__name__ == "JsonlStore":
        store.close()  # a live writer's file is left alone
    own = Chain(KEY)
    pruned = expired(store, now - timedelta(days=90))
    assert pruned is not None
    assert {(chain.writer, chain.below) for chain in pruned.chains} == {(straddling.writer, 3), (gone.writer, 5)}
    store.append([own.add(Started(program="test"), None), own.add(pruned, None)])
    for chain in pruned.chains:
        store.prune(chain.writer, chain.below)
    assert {stored.record.seq for stored in store.read(straddling.writer)} == {3, 4, 5}
    assert gone.writer not in store.writers()
    old_checkpoint = replace(read_checkpoints(tmp_path / "checkpoints")[0], time=old.timestamp())
    mac = KEY.mac("checkpoint", repr(old.timestamp()), gone.writer, old_checkpoint.seq, old_checkpoint.record)
    assert proof_of(store, checkpoints=[replace(old_checkpoint, mac=mac)]).holds
    assert expired(store, now - timedelta(days=90)) is None


def test_a_beginning_that_nobody_pruned_is_found(store: Store) -> None:
    chain, records = chain_of(COUNT)
    store.append(records[2:])
    (finding,) = proof_of(store).findings
    assert (finding.writer, finding.seq) == (chain.writer, 2)
    assert "no pruning is on record" in finding.what


def test_a_line_that_was_being_written_is_no_record(tmp_path: Path) -> None:
    chain, records = chain_of(COUNT)
    store = new_store("jsonl", tmp_path)
    store.append(records)
    store.close()
    path = tmp_path / "trail" / f"{chain.writer}.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    proof = proof_of(new_store("jsonl", tmp_path))
    assert proof.holds
    assert proof.records[chain.writer] == COUNT + 1


def test_every_event_survives_its_spelling() -> None:
    _, records = chain_of(2)
    for record in records:
        assert json.loads(record.event) == parse_event(record.event).model_dump(mode="json")


def test_a_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "audit.key"
    made = load_key(path, make=True, environment={})
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path, make=True, environment={}) == made
    assert [entry.name for entry in tmp_path.iterdir()] == ["audit.key"]
    assert made.secret.hex() not in repr(made)
    given_key = load_key(path, make=False, environment={KEY_VARIABLE: "ab" * 32})
    assert given_key.secret == bytes([0xAB]) * 32
    path.chmod(0o640)
    with pytest.raises(AuditError, match="chmod 600"):
        read_key(path)
    with pytest.raises(AuditError, match="64 lower-case"):
        load_key(path, make=False, environment={KEY_VARIABLE: "short"})
    with pytest.raises(AuditError, match="cannot be read"):
        load_key(tmp_path / "none", make=False, environment={})


def test_what_is_no_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "trail").mkdir()
    (tmp_path / "trail" / f"{'a' * 32}.jsonl").write_text("hello\n")
    store = open_store(url_of("jsonl", tmp_path))
    with pytest.raises(DamagedError, match="no record"):
        list(store.read("a" * 32))
    assert not proof_of(store).holds
    with pytest.raises(AuditError, match="no such"):
        open_store(url_of("sqlite", tmp_path / "elsewhere"))
    with pytest.raises(AuditError, match="not known"):
        open_store("mysql://x")


def test_a_changed_copy_of_an_event_has_a_spelling_of_its_own() -> None:
    event = decision()
    assert event.spelled == canonical(event)
    changed = event.model_copy(update={"plan": "another"})
    assert changed.spelled == canonical(changed) != event.spelled
    assert parse_event(changed.spelled) == changed
