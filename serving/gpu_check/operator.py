"""First tier: the tap operator with torch alone: exact, row by row, in every precision setting, in graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from serving.engine import ops
from serving.gpu_check.result import Checks

TOLERANCE = 2e-6
"""Of a product, in units of the row's norm (directions have norm 1). Float32 ends below 1e-6, TF32 above 5e-6."""
MASSIVE = 25_000.0
"""The norm of the embedded model's first position in its middle layers."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (576, 4096, 8192)
_COMPILED_TOLERANCE = 1e-2
"""Inductor keeps in float32 what eager torch rounds to bfloat16 in between."""
_DIRECTIONS = 64
_ROWS = 37
_TF32_BITS = 13
"""TF32 keeps 10 of float32's 23 bits of mantissa."""


class Case:
    """A stream with massive rows, directions that see them, and the buffers of a tap.

    Args:
        device: where.
        dtype: of the stream's two summands.
        d_model: width.
        rows: of the step.
        directions: at the tap.
        max_rows: of the buffer.
        seed: of everything random.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        d_model: int = 4096,
        rows: int = _ROWS,
        directions: int = _DIRECTIONS,
        max_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        hidden, residual = torch.randn(2, rows, d_model, generator=generator).unbind()
        # One dimension carries nearly all of every eighth row, and the directions look at it.
        residual[::8, d_model // 3] = MASSIVE * (1 + torch.rand(len(residual[::8]), generator=generator) / 7)
        weight = torch.randn(d_model, directions, generator=generator) / d_model**0.5
        weight[d_model // 3] = 0.3 + torch.rand(directions, generator=generator) / 3
        self.hidden, self.residual = hidden.to(device, dtype), residual.to(device, dtype)
        self.weight = (weight / weight.norm(dim=0)).to(device)
        self.bias = torch.randn(directions, generator=generator).to(device)
        self.out = torch.full((max_rows or rows, directions + 1), float("nan"), device=device)
        self.fired = torch.zeros(1, dtype=torch.int64, device=device)

    def read(self) -> None:
        """Run the operator."""
        ops.read(self.hidden, self.residual, self.weight, self.bias, self.out, self.fired)

    def errors(self, rows: int | None = None) -> tuple[float, float]:
        """Of what the last read left in the first rows, against float64.

        Returns: the largest error of a product in units of its row's norm, and of a squared norm in units of itself;
            both infinite where something is not finite.
        """
        count = self.hidden.shape[0] if rows is None else rows
        stream = self.hidden[:count].double() + self.residual[:count].double()
        norms = stream.norm(dim=1, keepdim=True)
        found = self.out[:count].double()
        if not bool(torch.isfinite(found).all()):
            return float("inf"), float("inf")
        products = (found[:, :-1] - (stream @ self.weight.double() + self.bias.double())).abs() / norms
        squares = (found[:, -1:] / norms.square() - 1).abs()
        return float(products.max()), float(squares.max())

    def tf32_error(self) -> float:
        """The error that a TF32 product of the same rows has: what the checks must be able to see."""
        stream = self.hidden.float() + self.residual.float()
        found = _to_tf32(stream).double() @ _to_tf32(self.weight).double()
        exact = stream.double() @ self.weight.double()
        return float(((found - exact).abs() / stream.double().norm(dim=1, keepdim=True)).max())


def check_operator(checks: Checks, device: torch.device) -> None:
    """All checks of the operator that this device can run."""
    for dtype in DTYPES:
        checks.guard(f"op.exact.{_name(dtype)}", lambda dtype=dtype: _exact(checks, device, dtype))  # type: ignore[misc]
    checks.guard("op.precision", lambda: _precision(checks, device))
    checks.guard("op.rows", lambda: _rows(checks, device))
    if device.type == "cuda" or shutil.which("g++") is not None:
        checks.guard("op.compiled", lambda: _compiled(checks, device))
    else:
        checks.skip("op.compiled", "there is no C++ compiler for torch's inductor")
    if device.type == "cuda":
        checks.guard("op.no_sync", lambda: _no_sync(checks, device))
        checks.guard("op.graph", lambda: _graph(checks, device))
    else:
        for name in ("op.no_sync", "op.graph"):
            checks.skip(name, f"needs CUDA; this ran on {device.type}")


def _exact(checks: Checks, device: torch.device, dtype: torch.dtype) -> None:
    for d_model in WIDTHS:
        case = Case(device, dtype, d_model=d_model)
        case.read()
        product, square = case.errors()
        tf32 = case.tf32_error()
        checks.require(
            f"op.exact.{_name(dtype)}.{d_model}",
            product <= TOLERANCE < tf32 and square <= 5 * TOLERANCE and case.fired.item() == 1,
            f"products within {product:.1e} of the row's norm, squared norms within {square:.1e}; {TOLERANCE:.0e} is "
            f"allowed, and TF32 would be off by {tf32:.1e}",
        )


def _precision(checks: Checks, device: torch.device) -> None:
    matmul = torch.backends.cuda.matmul
    settings: dict[str, Callable[[], None]] = {
        "high": lambda: torch.set_float32_matmul_precision("high"),
        "medium": lambda: torch.set_float32_matmul_precision("medium"),
        "allow_tf32": lambda: setattr(matmul, "allow_tf32", True),
        "fp32_precision": lambda: setattr(matmul, "fp32_precision", "tf32"),
        "mixed": _mix,
    }
    for name, choose in settings.items():
        with default_precision():
            choose()
            before = matmul.fp32_precision
            case = Case(device, torch.bfloat16)
            case.read()
            product, _ = case.errors()
            after = matmul.fp32_precision
        checks.require(
            f"op.precision.{name}",
            product <= TOLERANCE and before == after,
            f"products within {product:.1e} of the row's norm; torch's setting was {before!r} and is {after!r}",
        )


def _mix() -> None:
    """The older setting says TF32, the newer one does not: reading the older one raises now."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def _rows(checks: Checks, device: torch.device) -> None:
    case = Case(device, torch.bfloat16, max_rows=_ROWS + 3)
    case.read()
    clean = case.out.clone()
    real = _ROWS - 6
    case.hidden[real:], case.residual[real:] = float("nan"), float("inf")
    case.read()
    same = bool(torch.equal(case.out[:real], clean[:real]))
    spread = int((~torch.isfinite(case.out[:real])).sum())
    checks.require("op.rows.padded", same, f"NaN in 6 padded rows changed the others: {not same} ({spread} not finite)")
    untouched = bool(torch.isnan(case.out[_ROWS:]).all())
    checks.require("op.rows.beyond", untouched, f"rows beyond the step keep what they held: {untouched}")
    case.out = case.out[:3]
    try:
        case.read()
        checks.require("op.rows.too_many", False, "a step that does not fit its buffer was read")
    except ValueError as error:
        checks.require("op.rows.too_many", True, f"refused: {error}")


def _no_sync(checks: Checks, device: torch.device) -> None:
    case = Case(device, torch.bfloat16)
    case.read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    checks.require("op.no_sync", True, "the operator never waits for the device")


def _compiled(checks: Checks, device: torch.device) -> None:
    def layer(case: Case, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(hidden) * 2
        ops.read(hidden, residual, case.weight, case.bias, case.out, case.fired)
        return hidden + residual

    import torch._inductor.config as inductor

    sizes = (37, 5, 64)
    case = Case(device, torch.bfloat16, max_rows=max(sizes))
    with inductor.patch(enable_auto_functionalized_v2=False):
        compiled = torch.compile(
            lambda hidden, residual: layer(case, hidden, residual), fullgraph=True, dynamic=True, backend="inductor"
        )
        for rows in sizes:
            source = Case(device, torch.bfloat16, rows=rows, seed=rows)
            compiled(source.hidden, source.residual)
            plain = Case(device, torch.bfloat16, rows=rows)
            plain.hidden, plain.residual = torch.nn.functional.silu(source.hidden) * 2, source.residual
            plain.weight, plain.bias = case.weight, case.bias
            plain.read()
            # The compiled layer rounds its activation once, the other one twice.
            norms = plain.out[:, -1:].sqrt()
            error = float(((case.out[:rows, :-1] - plain.out[:, :-1]).abs() / norms).max())
            detail = f"compiled by inductor, dynamic rows: within {error:.1e} of eager"
            checks.require(f"op.compiled.{rows}", error <= _COMPILED_TOLERANCE, detail)
    fired = int(case.fired.item())
    checks.require("op.compiled.fired", fired == len(sizes), f"fired {fired} times in {len(sizes)} calls")


def _graph(checks: Checks, device: torch.device) -> None:
    """As vLLM captures: several sizes in one memory pool, static inputs, replays with fewer rows than were captured."""
    sizes = (64, 16, 1)
    case = Case(device, torch.bfloat16, rows=sizes[0])
    full = case.hidden, case.residual
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    with default_precision():
        # What is chosen at capture is in the graph for good.
        torch.set_float32_matmul_precision("high")
        for size in sizes:
            case.hidden, case.residual = full[0][:size], full[1][:size]
            graphs[size] = captured(case.read, pool=pool)
    for size, graph in graphs.items():
        for rows in sorted({1, size // 2 or 1, size}):
            source = Case(device, torch.bfloat16, rows=rows, seed=rows)
            full[0].fill_(float("nan"))
            full[1].fill_(float("nan"))
            full[0][:rows], full[1][:rows] = source.hidden, source.residual
            before = int(case.fired.item())
            case.out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            case.hidden, case.residual = full[0][:rows], full[1][:rows]
            product, square = case.errors(rows)
            fired = int(case.fired.item()) - before
            checks.require(
                f"op.graph.{size}.{rows}",
                product <= TOLERANCE and square <= 5 * TOLERANCE and fired == 1,
                f"graph of {size} rows replayed with {rows}, NaN in the rest: products within {product:.1e} of the "
                f"row's norm, fired {fired} time(s)",
            )


def captured(work: Callable[[], None], *, pool: object = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of some work, warmed up as torch asks for."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
        work()
    return graph


@contextmanager
def default_precision() -> Iterator[None]:
    """Let the block set torch's precision as it likes, and end with torch's defaults."""
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        backends: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
        for backend in backends:
            backend.matmul.fp32_precision = "none"


def _to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Rounded to TF32's mantissa, to the nearest."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + (1 << (_TF32_BITS - 1))) & -(1 << _TF32_BITS)).view(torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
