"""The stated memory is the memory: the figures against installed taps, a store in use, and the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from serving.bench.memory import Memory, dense_bank, large_example, markdown
from serving.engine.layers import KNOWN, Convention, Stack
from serving.engine.memory import measure_footprint
from serving.engine.store import ReadoutStore
from serving.engine.taps import TapSet, _tap

CPU = torch.device("cpu")


@pytest.mark.parametrize(("layers", "directions", "max_rows"), [((0,), 1, 1), ((1, 2, 5), 7, 33)])
def test_the_taps_of_a_worker_take_what_is_stated(layers: tuple[int, ...], directions: int, max_rows: int) -> None:
    bank = dense_bank(d_model=24, num_layers=6, layers=layers, directions=directions)
    modules = {layer: nn.Module() for layer in layers}
    for module in modules.values():
        module.register_buffer("of_the_model", torch.zeros(1000))
    for matrix in bank.matrices:
        _tap(modules[matrix.tap.layer], Convention.PLAIN.stream, matrix, max_rows=max_rows, device=CPU)
    stack = Stack(dict(modules), next(iter(KNOWN.values())), None)
    taps = TapSet(bank, {matrix.tap: modules[matrix.tap.layer] for matrix in bank.matrices}, stack, CPU)
    stated = measure_footprint(bank, max_rows=max_rows, num_blocks=2, block_size=4)
    assert taps.nbytes == stated.weights + stated.outputs


@pytest.mark.parametrize("capacity", [64, 100])
def test_the_figures_follow_the_formula_of_the_report(capacity: int) -> None:
    taps, used, d_model, rows, blocks, size = 3, 64, 576, 2048, 11, 128
    bank = dense_bank(d_model=d_model, num_layers=30, layers=(7, 15, 23), directions=used)
    if capacity > used:
        bank = type(bank)(bank.detectors, d_model=d_model, num_layers=30, capacity=capacity)
    found = measure_footprint(bank, max_rows=rows, num_blocks=blocks, block_size=size)
    assert found.columns == taps * (used + 1)
    assert found.weights == taps * ((d_model + 1) * capacity * 4 + 8)
    assert found.outputs == taps * rows * (capacity + 1) * 4
    # Columns that no detector owns are read and not kept.
    assert found.store_block == size * (found.columns * 4 + 1)
    assert found.store == blocks * found.store_block


def test_a_store_in_use_does_not_grow() -> None:
    bank = dense_bank(d_model=8, num_layers=2, layers=(0, 1), directions=3)
    stated = measure_footprint(bank, max_rows=4, num_blocks=5, block_size=4)
    store = ReadoutStore(num_blocks=5, block_size=4, columns=bank.used_columns(), width=bank.width)
    blocks = np.repeat(np.arange(5), 4)
    for _ in range(3):
        store.expect(np.arange(5))
        store.file(blocks, np.tile(np.arange(4), 5), np.ones((20, bank.width), dtype=np.float32))
    assert (store.nbytes, store.block_nbytes) == (stated.store, stated.store_block)


def test_the_large_example_is_stated_in_full() -> None:
    line = large_example()
    found = line.footprint
    assert (found.taps, found.directions, found.d_model, found.num_blocks, found.block_size) == (
        3,
        64,
        8192,
        100_000,
        16,
    )
    assert found.store == 100_000 * 16 * 781
    text = markdown([Memory("mine", found), line])
    assert (
        "| mine | 3 x 64 | 8,192 | 8,192 | 100,000 x 16 | 6.00 MiB | 6.09 MiB | 12.20 KiB | 781 B | 1.16 GiB |" in text
    )
