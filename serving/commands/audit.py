"""``telltale audit`` and ``telltale tail``: prove, copy, shorten and follow the audit trail; erase contents."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.commands.model import say

if TYPE_CHECKING:
    from monitor.audit.verify import Proof

EXIT_FAILED = 1
_PAGE = 1000

audit_app = typer.Typer(
    help="Prove, copy, shorten and erase the audit trail.", no_args_is_help=True, rich_markup_mode=None
)
_Policy = Annotated[
    Path | None, typer.Option("--policy", help="Policy file whose 'audit' says where the trail is.", show_default=False)
]
_Url = Annotated[str | None, typer.Option("--url", help="The trail's URL, in the place of the policy file's.")]
_KeyFile = Annotated[Path | None, typer.Option("--key-file", help="The key, in the place of the policy file's.")]


@audit_app.command()
def verify(
    policy: _Policy = None,
    *,
    url: _Url = None,
    key_file: _KeyFile = None,
    old_keys: Annotated[
        list[Path] | None, typer.Option("--old-key", help="File of a key that was used before; may be repeated.")
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="File of checkpoints, in the place of the policy file's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Prove that no record was changed, taken out, moved or put in. Exit code 1 and a line for each that was."""
    from monitor.audit.checkpoint import read_checkpoints
    from monitor.audit.key import read_key
    from monitor.audit.verify import verify as run
    from serving.trail import open_trail

    with open_trail(policy, url=url, key_file=key_file) as trail:
        keys = [trail.key, *(read_key(path) for path in old_keys or ())]
        sent = checkpoints or trail.checkpoints
        proof = run(trail.store, keys, read_checkpoints(sent) if sent is not None and sent.exists() else ())
        if sent is None or not sent.exists():
            say("no checkpoints: that the newest records were cut off is found only where a later chain names them")
    if as_json:
        sys.stdout.write(json.dumps(_as_json(proof), indent=2) + "\n")
    else:
        for finding in proof.findings:
            sys.stdout.write(f"{finding}\n")
        state = "the trail holds" if proof.holds else f"the trail does not hold: {len(proof.findings)} findings"
        total = sum(proof.records.values())
        sys.stdout.write(
            f"{state}; {total} records in {len(proof.records)} chains, {proof.erased} contents erased on record, "
            f"{proof.checkpoints} checkpoints\n"
        )
    if not proof.holds:
        raise typer.Exit(EXIT_FAILED)


@audit_app.command()
def export(
    policy: _Policy = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="New folder for the copy, JSON lines.", show_default=False)],
    url: _Url = None,
    key_file: _KeyFile = None,
) -> None:
    """Copy the whole trail into files, one a chain. The copy can be verified with the same key."""
    from monitor.audit.errors import AuditError
    from monitor.audit.store import open_store
    from serving.trail import open_trail

    if out.exists():
        raise AuditError(f"--out {out}: exists already; a copy goes into a new folder.")
    with open_trail(policy, url=url, key_file=key_file) as trail:
        copy = open_store(f"jsonl:///{out.absolute()}", make=True)
        total = 0
        for writer in trail.store.writers():
            page = []
            for stored in trail.store.read(writer):
                page.append(stored.record)
                if len(page) == _PAGE:
                    copy.append(page)
                    total, page = total + len(page), []
            if page:
                copy.append(page)
                total += len(page)
        copy.close()
    say(f"{total} records are in {out}; telltale audit verify --url jsonl:///{out.absolute()} proves them")


@audit_app.command()
def prune(
    policy: _Policy = None,
    *,
    older_than: Annotated[
        str | None, typer.Option(help="Days, e.g. 90d, in the place of the policy file's 'retention'.")
    ] = None,
    url: _Url = None,
    key_file: _KeyFile = None,
) -> None:
    """Remove the oldest records, and put that on record."""
    from datetime import UTC, datetime, timedelta

    from monitor.audit.errors import AuditError
    from monitor.audit.retention import expired
    from serving.trail import open_trail

    with open_trail(policy, url=url, key_file=key_file) as trail:
        age = older_than.removesuffix("d") if older_than is not None else trail.retention_days
        if age is None or not str(age).isdecimal() or int(age) < 1:
            given = f"is {older_than!r}" if older_than is not None else "is missing, and the policy has no 'retention'"
            raise AuditError(f"--older-than {given}; give a whole number of days: --older-than 90d.")
        pruned = expired(trail.store, datetime.now(UTC) - timedelta(days=int(age)))
        if pruned is None:
            say(f"nothing is older than {age} days, or what is belongs to a file that is being written")
            return
        with trail.chain() as chain:
            trail.store.append([chain.add(pruned, None)])
            for item in pruned.chains:
                trail.store.prune(item.writer, item.below)
    say(f"{len(pruned.chains)} chains begin later now, or are gone")


@audit_app.command()
def delete(
    policy: _Policy = None,
    *,
    request: Annotated[str | None, typer.Option(help="Id of a request, the client's or the engine's.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Name of a tenant.")] = None,
    url: _Url = None,
    key_file: _KeyFile = None,
) -> None:
    """Erase texts and ids of a request or a tenant. That something was decided stays, and the trail still holds."""
    from monitor.audit.erasure import erase
    from monitor.audit.errors import AuditError
    from monitor.audit.store import Selector
    from serving.trail import open_trail

    value = request if request is not None else tenant
    if value is None or (request is not None and tenant is not None):
        raise AuditError("exactly one of --request and --tenant is needed: whose contents are to be erased.")
    by = Selector.REQUEST if request is not None else Selector.TENANT
    with open_trail(policy, url=url, key_file=key_file) as trail:
        if not trail.store.find(by, value):
            say(f"the trail holds nothing of the {by.value} {value!r}")
            raise typer.Exit(EXIT_FAILED)
        with trail.chain() as chain:
            erased = erase(trail.store, chain, by, value)
    say(f"the contents of {len(erased)} records are erased")


def tail(
    policy: _Policy = None,
    *,
    last: Annotated[int, typer.Option(min=0, help="Events from before to begin with.")] = 10,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Wait for further ones.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON lines.")] = False,
    url: _Url = None,
) -> None:
    """Follow the events of the audit trail."""
    import time

    from monitor.audit.follow import Follower
    from serving.trail import open_reader, show_event

    with open_reader(policy, url=url) as store:
        follower = Follower(store)
        found = follower.last(last)
        while True:
            for stored in found:
                sys.stdout.write((stored.record.event if as_json else show_event(stored)) + "\n")
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(1)
            found = follower.new()


def _as_json(proof: Proof) -> dict[str, object]:
    return {
        "holds": proof.holds,
        "records": proof.records,
        "erased": proof.erased,
        "checkpoints": proof.checkpoints,
        "findings": [{"chain": item.writer, "record": item.seq, "what": item.what} for item in proof.findings],
    }
