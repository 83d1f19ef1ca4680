"""Taps on modules that are not vLLM's: what is read, what is left as it was, and that compilation keeps them."""

from __future__ import annotations

import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from probes.bank import TapMatrix
from probes.columns import direction_digest
from probes.taps import Tap
from serving.engine.layers import Convention, LayerError
from serving.engine.taps import Pick, TapSet, _tap, output_of

WIDTH, COLUMNS, ROWS = 6, 3, 5


class Layer(nn.Module):
    """Returns what a convention says."""

    def __init__(self, returns: Any) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return self.returns(hidden_states, residual)


def matrix() -> TapMatrix:
    generator = np.random.default_rng(2)
    weight = generator.normal(size=(WIDTH, COLUMNS)).astype(np.float32)
    return TapMatrix(Tap(0), weight, generator.normal(size=COLUMNS).astype(np.float32), np.arange(COLUMNS))


def tapped(layer: nn.Module, pick: Pick) -> TapMatrix:
    read = matrix()
    _tap(layer, pick, read, max_rows=8, device=torch.device("cpu"))
    return read


def require_rows(layer: nn.Module, read: TapMatrix, stream: torch.Tensor) -> None:
    out = layer.get_buffer("telltale_out")
    expected = stream.double().numpy() @ read.weight.astype(np.float64) + read.bias
    np.testing.assert_allclose(out[:ROWS, :COLUMNS].numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[:ROWS, COLUMNS].numpy(), stream.square().sum(1).numpy(), rtol=1e-5)
    assert bool(out[ROWS:].isnan().all())


CASES: dict[str, tuple[Any, Pick, Any]] = {
    "fused": (lambda h, r: (h * 2, r), Convention.FUSED.stream, lambda h, r: h * 2 + r),
    "stale": (lambda h, r: (h * 2, r), Convention.STALE.stream, lambda h, r: h * 2),
    "alone": (lambda h, r: (h * 2, None), Convention.ALONE.stream, lambda h, r: h * 2),
    "plain": (lambda h, r: h * 2, Convention.PLAIN.stream, lambda h, r: h * 2),
    "a batch of one": (lambda h, r: (h * 2)[None], Convention.PLAIN.stream, lambda h, r: h * 2),
    "a module with weights behind its output": (lambda h, r: ((h * 2)[None], None), output_of, lambda h, r: h * 2),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_is_read(case: str, compiled: bool) -> None:
    returns, pick, expected = CASES[case]
    layer = Layer(returns)
    read = tapped(layer, pick)
    hidden, residual = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    run: Any = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else layer
    with torch.inference_mode():
        run(hidden, residual)
    require_rows(layer, read, expected(hidden, residual))
    assert int(layer.get_buffer("telltale_fired")) == 1
    assert layer.state_dict() == {}


def test_another_instance_of_the_class_is_not_read() -> None:
    first, second = Layer(lambda h, r: h), Layer(lambda h, r: h)
    tapped(first, Convention.PLAIN.stream)
    assert type(second) is Layer
    assert isinstance(first, Layer)
    second(torch.ones(ROWS, WIDTH))
    assert int(first.get_buffer("telltale_fired")) == 0


def test_a_forward_bound_to_the_instance_is_read_and_not_hidden() -> None:
    # vLLM's fusers for transformers' modules do this; an attribute of the instance wins over the tapped class.
    layer = Layer(lambda h, r: h)
    layer.forward = types.MethodType(lambda self, hidden: hidden * 3, layer)  # type: ignore[method-assign]
    read = tapped(layer, output_of)
    hidden = torch.randn(ROWS, WIDTH)
    assert torch.equal(layer(hidden), hidden * 3)
    require_rows(layer, read, hidden * 3)


def test_a_forward_of_another_object_is_refused() -> None:
    layer, other = Layer(lambda h, r: h), Layer(lambda h, r: h)
    layer.forward = other.forward  # type: ignore[method-assign]
    with pytest.raises(LayerError, match="another object"):
        tapped(layer, output_of)


def test_an_output_that_is_no_tensor_is_refused() -> None:
    layer = Layer(lambda h, r: {"output": h})
    tapped(layer, output_of)
    with pytest.raises(LayerError, match="dict"):
        layer(torch.ones(ROWS, WIDTH))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_directions_go_into_free_columns_and_nothing_is_compiled_again(
    compiled: bool, made_in_inference_mode: bool
) -> None:
    layer = Layer(lambda h, r: h)
    with torch.inference_mode(made_in_inference_mode):
        read = tapped(layer, Convention.PLAIN.stream)
    taps = TapSet(SimpleNamespace(taps=(Tap(0),)), {Tap(0): layer}, SimpleNamespace(), torch.device("cpu"))  # type: ignore[arg-type]
    run: Any = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else layer
    hidden = torch.randn(ROWS, WIDTH)
    with torch.inference_mode():
        run(hidden)
    weight, bias = read.weight.copy(), read.bias.copy()
    weight[:, [2, 0]], bias[[2, 0]] = np.float32(3.0), np.float32([7.0, 8.0])
    fresh = torch.from_numpy(weight[:, [2, 0]]), torch.from_numpy(bias[[2, 0]])
    written = taps.write(Tap(0), [2, 0], *fresh)
    assert written == [direction_digest(Tap(0), weight[:, column], bias[column]) for column in (2, 0)]
    assert taps.write(Tap(1), [0], fresh[0][:, :1], fresh[1][:1]) is None
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        run(hidden)
    require_rows(layer, TapMatrix(Tap(0), weight, bias, np.arange(COLUMNS)), hidden)
