"""Whole rows of a step: those that were asked for, of the requests and positions that they were asked for."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from probes.taps import Tap
from serving.engine import pick_op
from serving.engine.pick_order import MAX_PICKS
from serving.engine.picks import PickSet, install_pick
from tests.support.tapset import tap_set

D_MODEL = 8
CPU = torch.device("cpu")


class Layer(nn.Module):
    """Gives back its stream in two parts, as vLLM's layers do."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden * 0.25, hidden * 0.75


def installed(layer: Layer) -> PickSet:
    taps = tap_set({0: layer}, capacity=2)
    found = install_pick(taps, Tap(0), d_model=D_MODEL, device=CPU)
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_row_is_that_of_its_request_and_position_or_missing(data: st.DataObject) -> None:
    """Chunks begin anywhere; positions before and behind them are asked for, too."""
    counts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    firsts = [data.draw(st.integers(0, 9)) for _ in counts]
    names = [f"r{number}" for number in range(len(counts))]
    positions = np.concatenate([np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)])
    starts = np.concatenate([[0], np.cumsum(counts)])
    places = st.lists(st.integers(0, 20), max_size=6, unique=True)
    orders = {name: data.draw(places) for name in (*names, "elsewhere") if data.draw(st.booleans())}
    stream = torch.randn(len(positions), D_MODEL, generator=torch.Generator().manual_seed(3))

    layer = Layer()
    picks = installed(layer)
    picks.arm(orders, names, torch.from_numpy(starts.astype(np.int32)), torch.from_numpy(positions))
    hidden, residual = layer(stream)
    assert torch.equal(hidden + residual, stream * 0.25 + stream * 0.75)
    taken = picks.collect()
    wanted = [(name, place) for name, listed in orders.items() if name in names for place in listed]
    if not wanted:
        assert taken is None
        return
    assert taken is not None
    assert list(taken.wanted) == wanted
    for (name, place), row in zip(wanted, taken.rows, strict=True):
        number = names.index(name)
        offset = place - firsts[number]
        if 0 <= offset < counts[number]:
            torch.testing.assert_close(row, stream[starts[number] + offset])
        else:
            assert bool(row.isnan().all())


def test_a_layer_that_does_not_run_leaves_no_row_of_before() -> None:
    layer = Layer()
    picks = installed(layer)
    for runs in (True, False):
        picks.arm({"a": [0]}, ["a"], torch.tensor([0, 1]), torch.tensor([0]))
        if runs:
            layer(torch.ones(1, D_MODEL))
        taken = picks.collect()
        assert taken is not None
        assert bool(taken.rows.isfinite().all()) == runs
    picks.arm({}, ["a"], torch.tensor([0, 1]), torch.tensor([1]))
    layer(torch.ones(1, D_MODEL))
    assert picks.collect() is None


def test_no_more_than_there_is_room_for() -> None:
    layer = Layer()
    picks = installed(layer)
    many = list(range(MAX_PICKS + 10))
    picks.arm({"a": many}, ["a"], torch.tensor([0, len(many)]), torch.tensor(many))
    layer(torch.randn(len(many), D_MODEL))
    taken = picks.collect()
    assert taken is not None
    assert len(taken.wanted) == MAX_PICKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_both_parts_is_not_rounded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, residual = (torch.randn(5, D_MODEL, generator=generator).to(dtype) for _ in range(2))
    picked = torch.empty(3, D_MODEL)
    index = torch.tensor([4, 0, 99])
    pick_op.pick(hidden, residual, index, picked)
    assert torch.equal(picked, (hidden.float() + residual.float())[[4, 0, 4]])
    assert picked.dtype is torch.float32


def test_the_operator_holds_what_it_promises_to_compilers() -> None:
    arguments = (torch.randn(5, D_MODEL), torch.randn(5, D_MODEL), torch.tensor([1, 2]), torch.empty(2, D_MODEL))
    torch.library.opcheck(pick_op.pick, arguments)
