"""What a tap left behind is read once: in the next step it is NaN unless the tap has run again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from probes.bank import TapMatrix
from probes.taps import Tap
from serving.engine import ops
from tests.support.tapset import tap_set

D_MODEL, WIDTH, MAX_ROWS = 6, 3, 16


class Tapped(nn.Module):
    """A layer with the buffers of a tap."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("telltale_weight", torch.randn(D_MODEL, WIDTH, generator=generator))
        self.register_buffer("telltale_bias", torch.randn(WIDTH, generator=generator))
        self.register_buffer("telltale_out", torch.full((MAX_ROWS, WIDTH + 1), float("nan")))
        self.register_buffer("telltale_fired", torch.zeros(1, dtype=torch.int64))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        ops.read(hidden, None, self.telltale_weight, self.telltale_bias, self.telltale_out, self.telltale_fired)
        return hidden * 2


@pytest.mark.covers("tap that stops firing", "noticed")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_tap_that_does_not_run_gives_nan_for_every_row_and_leaves_the_others(compiled: bool) -> None:
    layers = [Tapped(1), Tapped(2)]
    run = [torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer for layer in layers]
    taps = tap_set(dict(enumerate(layers)), capacity=WIDTH)
    stream = torch.randn(9, D_MODEL)
    for layer in run:
        layer(stream)
    first = taps.collect(9)
    assert torch.isfinite(first).all()
    run[0](stream[:5])
    second = taps.collect(5)
    torch.testing.assert_close(second[:, : WIDTH + 1], first[:5, : WIDTH + 1])
    assert torch.isnan(second[:, WIDTH + 1 :]).all()
    assert torch.isfinite(first).all(), "what was collected does not change with the buffer"
    assert taps.fired() == {"resid_post.0": 2, "resid_post.1": 1}


@pytest.mark.covers("weights on the device that are not the bank's", "noticed")
def test_what_lies_on_the_device_is_told_from_anything_else() -> None:
    layer = Tapped(3)
    taps = tap_set({4: layer}, capacity=WIDTH)
    weight, bias = layer.telltale_weight.numpy().copy(), layer.telltale_bias.numpy().copy()
    digest = TapMatrix(Tap(4), weight, bias, np.arange(WIDTH)).digest()
    assert taps.resident() == {"resid_post.4": digest}
    assert TapMatrix(Tap(5), weight, bias, np.arange(WIDTH)).digest() != digest
    layer.telltale_bias[0] = float(np.nextafter(np.float32(bias[0]), np.float32(9e9)))
    assert taps.resident()["resid_post.4"] != digest
