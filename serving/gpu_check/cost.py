"""First tier: what a tap costs beside a layer of the size of a real one, with torch alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from serving.engine import ops
from serving.gpu_check.operator import Case, captured
from serving.gpu_check.result import Cost

ROWS = (1, 64, 256, 2048, 8192)
DIRECTIONS = (64, 256)
_REPEATS = 15
_INNER_SECONDS = 0.02
"""Each sample lasts about so long: events resolve half a microsecond."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The products of a decoder layer.

    Attributes:
        name: of the model's size.
        d_model: width of the stream.
        qkv, heads, mlp: widths of the attention's input and output products, and of the hidden layer.
    """

    name: str
    d_model: int
    qkv: int
    heads: int
    mlp: int


SHAPES = (Shape("8B", 4096, 6144, 4096, 14336), Shape("70B", 8192, 10240, 8192, 28672))
"""Llama 3's, on one device."""


class Layer:
    """The products, norms and activation of a decoder layer, without attention: a lower bound of its time."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) / math.sqrt(columns)

        self._qkv, self._out = weight(shape.qkv, shape.d_model), weight(shape.d_model, shape.heads)
        self._up, self._down = weight(2 * shape.mlp, shape.d_model), weight(shape.d_model, shape.mlp)
        self._norm = torch.ones(shape.d_model, device=device, dtype=dtype)
        self._shape = shape

    def __call__(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, d_model) twice, as vLLM's fused layers hand them on."""
        linear, normed = torch.nn.functional.linear, torch.nn.functional.rms_norm
        residual = hidden + residual
        attention = linear(normed(residual, (self._shape.d_model,), self._norm), self._qkv)[:, : self._shape.heads]
        residual = linear(attention, self._out) + residual
        gate, up = linear(normed(residual, (self._shape.d_model,), self._norm), self._up).chunk(2, dim=1)
        added: torch.Tensor = linear(torch.nn.functional.silu(gate) * up, self._down)
        return added, residual


def measure_costs(
    device: torch.device,
    progress: Callable[[str], None],
    *,
    shapes: Sequence[Shape] = SHAPES,
    rows: Sequence[int] = ROWS,
    directions: Sequence[int] = DIRECTIONS,
) -> tuple[Cost, ...]:
    """Time the layer, the layer with a tap, and the tap; on CUDA as replayed graphs, as they run in a server."""
    costs = []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in shapes:
        layer = Layer(shape, device, dtype)
        for count in rows:
            for width in directions:
                case = Case(device, dtype, d_model=shape.d_model, rows=count, directions=width)
                costs.append(_measure(layer, shape, case))
                one = costs[-1]
                progress(
                    f"cost     {one.shape}, {count} rows, {width} directions: layer {one.layer_us:.1f} us, the tap "
                    f"adds {one.share:+.1%}"
                )
        del layer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return tuple(costs)


def _measure(layer: Layer, shape: Shape, case: Case) -> Cost:
    device, (rows, _), directions = case.hidden.device, case.hidden.shape, case.weight.shape[1]
    # A layer's input, not the case's massive rows: those would overflow the activation.
    hidden = torch.randn_like(case.hidden)
    residual = torch.randn_like(hidden)

    def run_layer() -> None:
        layer(hidden, residual)

    def run_tapped() -> None:
        ops.read(*layer(hidden, residual), case.weight, case.bias, case.out, case.fired)

    with torch.inference_mode():
        timers = [_Timer(work, device) for work in (run_layer, run_tapped, case.read)]
        samples: list[list[float]] = [[] for _ in timers]
        # Turn by turn: clocks and temperature move under all three alike.
        for _ in range(_REPEATS):
            for timer, kept in zip(timers, samples, strict=True):
                kept.append(timer.sample())
    layer_us, tapped_us, tap_us = (statistics.median(kept) for kept in samples)
    return Cost(shape.name, rows, directions, layer_us, tapped_us, tap_us)


class _Timer:
    """Times one piece of work, as a replayed graph on CUDA."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._graph = captured(work)  # kept: a graph that is collected frees its memory
            work = self._graph.replay
        self._work = work
        self._work()
        self._inner = 1
        self._inner = max(1, int(_INNER_SECONDS * 1e6 / max(self.sample(), 1.0)))

    def sample(self) -> float:
        """Microseconds of one run."""
        if not self._cuda:
            start = time.perf_counter()
            for _ in range(self._inner):
                self._work()
            seconds: float = time.perf_counter() - start
            return seconds * 1e6 / self._inner
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(self._inner):
            self._work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / self._inner
