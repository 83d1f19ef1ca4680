"""Shelves against a plain dictionary: what was filed belongs to a direction and never to its column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.shelves import Shelves

BLOCKS = 3
SIZE = 2
COLUMNS = 3
DIRECTIONS = ("p", "q", "r", "s")
ENTRIES = st.dictionaries(st.integers(0, COLUMNS - 1), st.sampled_from(DIRECTIONS), min_size=1, max_size=COLUMNS)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), ENTRIES),
        st.tuples(st.just("expect"), st.integers(0, BLOCKS - 1)),
        st.tuples(st.just("schedule"), st.integers(0, BLOCKS - 1)),
        st.tuples(st.just("file"), st.just(0)),
        st.tuples(st.just("lose"), st.integers(0, BLOCKS - 1)),
    ),
    max_size=40,
)


@given(ENTRIES, OPERATIONS)
@settings(max_examples=200, deadline=None)
def test_a_reading_is_what_its_directions_read_or_nothing(  # noqa: PLR0912 - one branch for each operation
    first: dict[int, str], operations: list[tuple[str, Any]]
) -> None:
    shelves = Shelves(num_blocks=BLOCKS, block_size=SIZE, width=COLUMNS)
    device, numbers = dict(first), iter(range(1, 10_000))
    shelves.hold(device.items())
    # The truth: by entry and block, what it read there; None while that is on its way.
    truth: dict[tuple[tuple[int, str], int], np.ndarray | None] = {}
    under_way: list[tuple[int, Any, dict[int, str], np.ndarray]] = []
    for what, value in operations:
        if what == "hold":
            truth = {key: rows for key, rows in truth.items() if key[0] in value.items()}
            device = dict(value)
            shelves.hold(device.items())
        elif what == "expect":
            for store in shelves.stores:
                store.expect(np.array([value]))
            for entry in device.items():
                truth[entry, value] = None
        elif what == "schedule":
            rows = np.array([[next(numbers) for _ in range(COLUMNS)] for _ in range(SIZE)], dtype=np.float32)
            under_way.append((value, shelves.stores, dict(device), rows))
        elif what == "file" and under_way:
            block, stores, then, rows = under_way.pop(0)
            for store in stores:
                store.file(np.full(SIZE, block), np.arange(SIZE), rows)
            for entry in then.items():
                if entry in device.items() and _lasted(entry, stores, shelves):
                    truth[entry, block] = rows[:, entry[0]]
        elif what == "lose":
            for store in shelves.stores:
                store.lose(np.array([value]))
            truth = {key: rows for key, rows in truth.items() if key[1] != value}
    reading = shelves.reading(device.items())
    for block in range(BLOCKS):
        blocks = np.array([block])
        known = [truth.get((entry, block), "absent") for entry in device.items()]
        assert reading.covered(blocks) == (not any(isinstance(item, str) for item in known))
        whole = not any(item is None or isinstance(item, str) for item in known)
        assert reading.is_filed(blocks) == whole
        rows = reading.read(blocks)
        assert np.isnan(rows).all() != whole
        if whole:
            for (column, _), expected in zip(device.items(), known, strict=True):
                np.testing.assert_array_equal(rows[:, column], expected)


def _lasted(entry: tuple[int, str], stores: Any, shelves: Shelves) -> bool:
    """Whether an entry stands on the shelf on which it stood when a step was scheduled."""
    part = shelves.reading([entry])._parts[0]
    return any(part.store is store for store in stores)


def test_what_is_not_held_cannot_be_read() -> None:
    shelves = Shelves(num_blocks=1, block_size=SIZE, width=COLUMNS)
    shelves.hold([(0, "p")])
    with pytest.raises(ValueError, match="not held"):
        shelves.reading([(0, "q")])


def test_shelves_without_entries_are_given_back() -> None:
    shelves = Shelves(num_blocks=1, block_size=SIZE, width=COLUMNS)
    shelves.hold([(0, "p"), (1, "q")])
    shelves.hold([(0, "p"), (1, "r")])
    assert len(shelves.stores) == 2
    shelves.hold([(1, "r")])
    assert len(shelves.stores) == 1
