"""The readout store against a plain dictionary, and the places of rows against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.placement import Span, places_of
from serving.engine.store import ReadoutStore

SIZE = 4
WIDTH = 5
COLUMNS = np.array([0, 2, 4])


def make_store(blocks: int = 6) -> ReadoutStore:
    return ReadoutStore(num_blocks=blocks, block_size=SIZE, columns=COLUMNS, width=WIDTH)


def rows(count: int, start: float = 0.0) -> np.ndarray:
    return (start + np.arange(count * WIDTH, dtype=np.float32)).reshape(count, WIDTH)


def fill(store: ReadoutStore, block: int, start: float = 0.0) -> np.ndarray:
    content = rows(SIZE, start)
    store.file(np.full(SIZE, block), np.arange(SIZE), content)
    return content


def test_what_was_filed_comes_back_in_the_columns_that_mean_something() -> None:
    store = make_store()
    store.expect(np.array([3, 1]))
    first, second = fill(store, 3), fill(store, 1, 100.0)
    found = store.read(np.array([3, 1]))
    np.testing.assert_array_equal(found[:, COLUMNS], np.concatenate([first, second])[:, COLUMNS])
    assert not found[:, [1, 3]].any()


@pytest.mark.covers("cached block without readouts", "noticed")
def test_a_pending_block_is_covered_and_reads_as_nan_until_it_is_filed() -> None:
    store = make_store()
    store.expect(np.array([2]))
    assert store.covered(np.array([2])) == 1
    assert np.isnan(store.read(np.array([2]))).all()
    store.file(np.array([2, 2]), np.array([0, 1]), rows(2))
    found = store.read(np.array([2]))
    assert np.isfinite(found[:2][:, COLUMNS]).all()
    assert np.isnan(found[2:]).all()


@pytest.mark.covers("cached block without readouts", "kept out")
def test_a_block_that_was_never_expected_or_was_lost_ends_the_cover() -> None:
    store = make_store()
    store.expect(np.array([0, 1, 2]))
    fill(store, 0)
    fill(store, 1)
    fill(store, 2)
    assert store.covered(np.array([0, 1, 2, 3])) == 3
    store.lose(np.array([1]))
    assert store.covered(np.array([0, 1, 2])) == 1
    assert store.covered(np.array([1])) == 0


@pytest.mark.covers("cached block without readouts", "noticed")
def test_a_block_that_is_handed_out_anew_forgets_what_it_held() -> None:
    store = make_store()
    store.expect(np.array([4]))
    fill(store, 4)
    store.expect(np.array([4]))
    assert np.isnan(store.read(np.array([4]))).all()


def test_memory_is_bounded_by_the_number_of_blocks() -> None:
    assert make_store(10).nbytes == 10 * SIZE * (len(COLUMNS) * 4 + 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=6), st.data())
def test_places_equal_a_plain_loop(requests: list[tuple[int, int, int]], data: st.DataObject) -> None:
    spans, ids, counts, positions, expected = {}, [], [], [], []
    next_block = 0
    row = 0
    for number, (start, count, margin) in enumerate(requests):
        name = f"r{number}"
        first = max(0, start - margin) // SIZE
        blocks = list(range(next_block, next_block + (start + count - 1) // SIZE - first + 1))
        next_block += len(blocks)
        known = data.draw(st.booleans())
        if known:
            spans[name] = Span(first, blocks)
        ids.append(name)
        counts.append(count)
        for position in range(start, start + count):
            positions.append(position)
            if known:
                expected.append((row, blocks[position // SIZE - first], position % SIZE))
            row += 1
    places = places_of(spans, ids, np.array(counts), np.array(positions), block_size=SIZE)
    assert list(zip(places.rows, places.blocks, places.offsets, strict=True)) == expected


def test_rows_outside_their_span_have_no_place() -> None:
    places = places_of({"a": Span(2, [7])}, ["a"], np.array([3]), np.array([7, 8, 12]), block_size=SIZE)
    assert places.rows.tolist() == [1]
    assert places.blocks.tolist() == [7]


@pytest.mark.parametrize("count", [0, 1])
def test_a_step_without_known_requests_has_no_places(count: int) -> None:
    places = places_of({}, ["a"] * count, np.ones(count, dtype=np.int64), np.zeros(count, dtype=np.int64), block_size=4)
    assert len(places.rows) == len(places.blocks) == 0


@pytest.mark.covers("cached block without readouts", "kept out")
def test_after_everything_is_lost_no_block_is_covered_until_it_is_whole_again() -> None:
    store = make_store()
    for block in range(6):
        fill(store, block)
    store.expect(np.array([5]))
    store.lose_all()
    assert store.covered(np.arange(6)) == 0
    assert np.isnan(store.read(np.arange(6))[:, COLUMNS]).all()
    again = fill(store, 2, 100.0)
    assert store.covered(np.array([2, 3])) == 1
    assert np.array_equal(store.read(np.array([2]))[:, COLUMNS], again[:, COLUMNS])
