"""The page docs/fail-contract.md, from what an engine with an injected fault really answered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/fail-contract.md"
Outcome = Mapping[str, Any]
PLACES = [(where, how) for where in ("prompt", "stream") for how in ("whole", "streamed")]
ON_GAP = ("block", "flag", "allow")


def in_words(outcome: Outcome) -> str:
    """What a client got, and what is known of it."""
    if outcome["finish"] == "content_filter":
        got = "what was shown, then the refusal" if outcome["shown"] else "the refusal alone"
    else:
        got = "the reply"
    return got if outcome["action"] in {"block", "allow"} else f"{got}, flagged"


def page(contract: Mapping[str, Any], names: Mapping[str, str], reasons: Mapping[str, str]) -> str:
    """The page.

    Args:
        contract: by fault, where, how and ``on_gap``: the outcome.
        names: of the faults that go into the page, in words.
        reasons: by fault, the label under which its positions are counted.
    """
    tables: dict[str, list[str]] = {}
    for fault, name in names.items():
        rows = []
        for where, how in PLACES:
            cells = (in_words(contract[fault][where][how][action]) for action in ON_GAP)
            rows.append(f"| {where} | {how} | {' | '.join(cells)} |")
        tables.setdefault("\n".join(rows), []).append(f"{name} (`{reasons[fault]}`)")
    return (
        _HEAD + "".join(_TABLE.format(faults="; ".join(faults), rows=rows) for rows, faults in tables.items()) + _REST
    )


_HEAD = """\
# What fails, and what the client gets

Written by `tests/engine/test_faults.py`, which breaks one thing at a time in a real engine and looks at what a client
gets: `WRITE_FAIL_CONTRACT=1 .venv/bin/pytest tests/engine/test_faults.py`. Without the variable the test fails where
the page is not what the engine does. *Prompt*: the fault is there from the first step on. *Stream*: it begins when
some of the reply is there. *Whole*: the reply is asked for in one piece. The last columns are the policy's `on_gap`.
"""
_TABLE = """
{faults}:

| begins in the | asked for | `block` | `flag` | `allow` |
|---|---|---|---|---|
{rows}
"""
_REST = """
No token that was not scored is shown where `on_gap: block` stands: `hold_back` keeps each back until it is. Whatever
the policy says, each position that was not scored is counted in `telltale_tokens_skipped_total` under the reason that
stands in brackets, and the alert on gaps follows.

Also where no step fails:

* **A canary fails, is late or is not answered** (a wrong bank, a tap that stops, a step that takes too long): every
  request follows `on_gap` until one passes, and `/ready` is 503 ([coverage.md](coverage.md), gaps).
* **More requests than the engine takes at once**: they wait in vLLM's queue. Nothing is skipped: scores are part of the
  step (`tests/engine/test_schedulers.py`).
* **The audit trail cannot be written, or its queue is full**: as `audit.on_error` and `audit.on_full` say. No new
  request and no byte that no event vouches for, or losses that are counted (`tests/unit/test_release.py`,
  [audit.md](audit.md)).
* **The engine or a worker dies**: requests under way get an error, the server ends (`tests/engine/test_live_proof.py`).
"""
