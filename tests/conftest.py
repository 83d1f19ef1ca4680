"""What ``@pytest.mark.covers`` says is held against what pytest sees, so that docs/coverage.md cannot be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.coverage_marks import MarkError, Proof, proofs_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each collected test is in the table as pytest has it: its markers, its parameter, its tier."""
    read: dict[Path, list[Proof]] = {}
    for item in items:
        marks = list(item.iter_markers("covers"))
        if not marks:
            continue
        try:
            if item.path not in read:
                read[item.path] = proofs_of(item.path)
        except MarkError as error:
            raise pytest.UsageError(str(error)) from error
        names = item.nodeid.split("[")[0].split("::")[1:]
        mine = [proof for proof in read[item.path] if proof.test.split("::")[1:] == names]
        if told := _difference(item, marks, mine):
            raise pytest.UsageError(f"{item.nodeid}: covers: {told}")


def _difference(item: pytest.Item, marks: list[pytest.Mark], mine: list[Proof]) -> str | None:
    callspec = getattr(item, "callspec", None)
    values = [value for value in callspec.params.values() if isinstance(value, str)] if callspec else []
    slow = item.get_closest_marker("slow") is not None
    expected = set()
    for invariant in {mark.args[1] for mark in marks}:
        named = [mark.args[0] for mark in marks if mark.args[1] == invariant]
        by_value = {key: mode for modes in named if isinstance(modes, dict) for key, mode in modes.items()}
        hits = [value for value in values if value in by_value]
        if by_value and len(hits) != 1:
            return f"of its parameters {values}, one must be a key of {sorted(by_value)} ({invariant!r})"
        expected |= {(by_value[value], invariant, value, slow) for value in hits}
        for modes in named:
            if not isinstance(modes, dict):
                plain = [modes] if isinstance(modes, str) else modes
                expected |= {(mode, invariant, None) for mode in plain}
    found = {(proof.mode, proof.invariant, proof.parameter, proof.slow) for proof in mine if proof.parameter in values}
    found |= {(proof.mode, proof.invariant, None) for proof in mine if proof.parameter is None}
    if found != expected:
        return (
            f"the table would say {sorted(map(str, found - expected))}, pytest has {sorted(map(str, expected - found))}"
        )
    return None
