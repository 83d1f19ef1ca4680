"""Writes docs/coverage.md from the markers of the tests: ``python -m tests.support.coverage_table [--check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.support.coverage_marks import ROOT, MarkError, Proof, proofs
from tests.support.coverage_rows import ACCOUNTED, FAULTS, GAP_FOLLOWED, INVARIANTS, MODES, NOT_COVERED, Fault

DOCUMENT = Path("docs/coverage.md")
COMMAND = ".venv/bin/python -m tests.support.coverage_table"
INTRODUCTION = f"""\
# What is covered, and by which test

Written by `{COMMAND}` from the `@pytest.mark.covers` markers of the tests;
`make check` fails if it is out of date. The words come from `tests/support/coverage_rows.py`.

A mode is covered if a test runs it and holds the invariant against something independent: transformers, plain vLLM, or
the definition. The invariant of most weight is **{ACCOUNTED}**: `scored + skipped == positions`, where
skipped are only sinks and the final token, which the model never computes. Whatever else was not scored is a gap.

A pair of mode and invariant that is not in the table is not claimed. These tests run on CPUs. Tests in `engine/` start
vLLM or parts of it; tests in `unit/` start no engine. Tests marked "(slow)" are left out of `make test`.

```
make test                                                      # the quick tests
.venv/bin/pytest -m slow                                       # the slow ones: minutes
.venv/bin/pytest tests/engine/test_modes.py -k preempted       # one mode
```

"""
GAPS = """\
## Faults that leave positions unscored

Each position is counted in `telltale_gaps_total` under the reason, and in the request's account; then the policy's
`on_gap` decides. What it does is shown for faults that are there when the request begins, so that `block` sends no
token at all. Where a fault comes later, `block` ends the reply there; what `hold_back` let out before has been sent.
A "canary" fault lasts until a canary passes, even if its cause has gone. "-" is a case that no test injects.

"""
ENDS = """\
## Other faults

"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(proof: Proof) -> str:
    """How a test is named in the table."""
    parameter = f" with `{proof.parameter}`" if proof.parameter is not None else ""
    return f"`{proof.test}`{parameter}{' (slow)' if proof.slow else ''}"


def mode_rows(found: list[Proof]) -> Iterable[list[str]]:
    """mode, invariant, tests."""
    for mode, meaning in MODES.items():
        if mode in NOT_COVERED:
            yield [f"**{mode}**: {meaning}", "-", f"no test: {NOT_COVERED[mode]}"]
        shown = f"**{mode}**: {meaning}"
        for invariant in INVARIANTS:
            tests = [cell(proof) for proof in found if (proof.mode, proof.invariant) == (mode, invariant)]
            if tests:
                yield [shown, invariant, "<br>".join(tests)]
                shown = mode


def fault_tests(found: list[Proof], fault: str) -> str:
    """The tests of a fault, under what they prove."""
    lines = []
    for invariant in INVARIANTS:
        tests = [cell(proof) for proof in found if (proof.mode, proof.invariant) == (fault, invariant)]
        lines += [f"{invariant}:", *tests] if tests else []
    return "<br>".join(lines)


def gap_row(found: list[Proof], name: str, fault: Fault) -> list[str]:
    """fault, reason, what each ``on_gap`` does, tests."""
    return [name, f"`{fault.counted}`", *fault.on_gap, fault_tests(found, name)]


def render(found: list[Proof]) -> str:
    """The document."""
    words = table(("invariant", "what is meant"), INVARIANTS.items())
    modes = table(("mode", "invariant", "test, in `tests/`"), mode_rows(found))
    gaps = table(
        ("fault", "reason", *(f"`on_gap: {action}`" for action in ("block", "flag", "allow")), "proof"),
        (gap_row(found, name, fault) for name, fault in FAULTS.items() if fault.is_gap),
    )
    others = table(
        ("fault", "what follows", "counted in", "proof"),
        (
            [name, fault.follows, fault.counted and f"`{fault.counted}`", fault_tests(found, name)]
            for name, fault in FAULTS.items()
            if not fault.is_gap
        ),
    )
    return f"{INTRODUCTION}{words}\n## Modes\n\n{modes}\n{GAPS}{gaps}\n{ENDS}{others}"


def problems(found: list[Proof]) -> list[str]:
    """What the words and the tests do not agree on."""
    proved = {proof.mode for proof in found}
    followed = {proof.mode for proof in found if proof.invariant == GAP_FOLLOWED}
    told = [
        f"{word!r} has neither a test nor a reason in NOT_COVERED"
        for word in MODES
        if word not in proved | {*NOT_COVERED}
    ]
    told += [f"{word!r} is in NOT_COVERED and has a test" for word in NOT_COVERED if word in proved]
    told += [f"{word!r} is in NOT_COVERED and is no mode" for word in NOT_COVERED if word not in MODES]
    told += [f"the fault {word!r} has no test" for word in FAULTS if word not in proved]
    told += [
        f"no test of the fault {word!r} proves: {GAP_FOLLOWED}"
        for word, fault in FAULTS.items()
        if fault.is_gap and word not in followed
    ]
    unused = set(INVARIANTS) - {proof.invariant for proof in found}
    return told + [f"the invariant {word!r} has no test" for word in sorted(unused)]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the document, or compare; 1 if it is out of date or a marker is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the file is out of date")
    check = parser.parse_args(arguments).check
    try:
        found = proofs(root)
    except MarkError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if wrong := problems(found):
        sys.stderr.write("".join(f"tests/support/coverage_rows.py: {line}\n" for line in wrong))
        return 1
    path, text = root / DOCUMENT, render(found)
    if not check:
        path.write_text(text)
    elif not path.is_file() or path.read_text() != text:
        sys.stderr.write(f"{DOCUMENT} is not what the markers of the tests say. Run: {COMMAND}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
