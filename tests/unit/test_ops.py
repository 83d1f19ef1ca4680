"""The tap operator: exact where float32 is, row by row, compiled or not, whatever torch's precision settings say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from serving.engine import ops

D_MODEL = 96
WIDTH = 5
CUDA = torch.device("cuda")
Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def buffers(rows: int, *, d_model: int = D_MODEL, width: int = WIDTH) -> Buffers:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(d_model, width, generator=generator) / d_model**0.5
    bias = torch.randn(width, generator=generator)
    return weight, bias, torch.full((rows, width + 1), float("nan")), torch.zeros(1, dtype=torch.int64)


def stream(rows: int, dtype: torch.dtype, *, d_model: int = D_MODEL) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(2, rows, d_model, generator=generator).to(dtype).unbind())  # type: ignore[return-value]


@pytest.fixture
def precision() -> Iterator[None]:
    """torch's settings are those of the process: put them back."""
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        backend.matmul.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [True, False])
def test_the_readout_is_that_of_the_exact_sum(dtype: torch.dtype, with_residual: bool) -> None:
    hidden, residual = stream(7, dtype)
    weight, bias, out, fired = buffers(7)
    exact = hidden.double() + (residual.double() if with_residual else 0)
    before = hidden.clone(), residual.clone()
    ops.read(hidden, residual if with_residual else None, weight, bias, out, fired)
    expected = exact @ weight.double() + bias.double()
    scale = exact.norm(dim=1, keepdim=True)
    # A sum rounded to bfloat16 would be off by 4e-3 of the norm, to float16 by 5e-4.
    assert torch.all((out[:, :WIDTH].double() - expected).abs() <= 1e-6 * scale)
    torch.testing.assert_close(out[:, WIDTH].double(), exact.square().sum(dim=1), rtol=5e-6, atol=0)
    assert torch.equal(hidden, before[0])
    assert torch.equal(residual, before[1])
    assert fired.item() == 1


def test_a_massive_row_keeps_float32s_precision() -> None:
    hidden, residual = stream(3, torch.float32, d_model=4096)
    hidden[1, 17] = 25_000.0
    weight, bias, out, fired = buffers(3, d_model=4096)
    ops.read(hidden, residual, weight, bias, out, fired)
    exact = hidden.double() + residual.double()
    expected = exact @ weight.double() + bias.double()
    assert torch.all((out[:, :WIDTH].double() - expected).abs() <= 1e-6 * exact.norm(dim=1, keepdim=True))
    torch.testing.assert_close(out[:, WIDTH].double(), exact.square().sum(dim=1), rtol=5e-6, atol=0)


@pytest.mark.covers("padded rows", "isolation")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padded_rows_reach_no_other_row(poison: float) -> None:
    hidden, residual = stream(8, torch.bfloat16)
    weight, bias, clean, fired = buffers(8)
    ops.read(hidden, residual, weight, bias, clean, fired)
    hidden[5:], residual[6:] = poison, -poison
    out = torch.full_like(clean, float("nan"))
    ops.read(hidden, residual, weight, bias, out, fired)
    assert torch.equal(out[:5], clean[:5])
    assert not torch.isfinite(out[5:]).any()


def test_rows_beyond_the_step_keep_what_they_held() -> None:
    weight, bias, out, fired = buffers(9)
    out[:] = 3.0
    hidden, residual = stream(4, torch.float32)
    ops.read(hidden, residual, weight, bias, out, fired)
    assert torch.all(out[4:] == 3.0)
    ops.read(hidden[:0], residual[:0], weight, bias, out, fired)
    assert fired.item() == 2


def test_a_step_that_does_not_fit_is_refused() -> None:
    weight, bias, out, fired = buffers(3)
    hidden, residual = stream(4, torch.float32)
    with pytest.raises(ValueError, match=r"4 rows.*buffer 3"):
        ops.read(hidden, residual, weight, bias, out, fired)


@pytest.mark.parametrize("with_residual", [True, False])
def test_the_operator_is_well_formed(with_residual: bool) -> None:
    """Schema, mutated arguments, fake implementation, and tracing with symbolic shapes."""
    hidden, residual = stream(6, torch.bfloat16)
    arguments = (hidden, residual if with_residual else None, *buffers(6))
    torch.library.opcheck(ops.read, arguments)


class Tapped(torch.nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(D_MODEL, D_MODEL, bias=False)
        for name, buffer in zip(("weight", "bias", "out", "fired"), buffers(rows), strict=True):
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.functional.gelu(self.linear(hidden))
        ops.read(hidden, residual, self.weight, self.bias, self.out, self.fired)
        return hidden * 2, residual + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_survives_compilation_with_dynamic_rows(backend: str) -> None:
    import torch._inductor.config as inductor

    # As vLLM compiles: the whole graph, symbolic rows, version 1 of functionalisation.
    with inductor.patch(enable_auto_functionalized_v2=False):
        compile_and_compare(backend)


def compile_and_compare(backend: str) -> None:
    from torch._inductor.utils import run_and_get_code

    module = Tapped(64).requires_grad_(False)
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    code = ""
    for number, rows in enumerate((33, 5, 64, 17), start=1):
        hidden, residual = stream(rows, torch.float32)
        if backend == "inductor" and number == 1:
            result, sources = run_and_get_code(compiled, hidden, residual)
            code = "\n".join(sources)
        else:
            result = compiled(hidden, residual)
        expected = torch.nn.functional.gelu(module.linear(hidden))
        torch.testing.assert_close(result[0], expected * 2)
        exact = (expected + residual) @ module.weight + module.bias
        torch.testing.assert_close(module.out[:rows, :WIDTH], exact, rtol=1e-4, atol=1e-4)
        assert module.fired.item() == number
    if code:
        # Called in place, once, on the module's own buffers: none of them is copied for it.
        assert code.count("torch.ops.telltale.read.default(") == 1
        assert "clone" not in code


@pytest.mark.parametrize("way", ["set_float32_matmul_precision", "allow_tf32", "fp32_precision", "inherited"])
def test_tf32_is_off_inside_and_back_afterwards(way: str, precision: None) -> None:
    matmul = torch.backends.cuda.matmul
    match way:
        case "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("high")
        case "allow_tf32":
            matmul.allow_tf32 = True
        case "fp32_precision":
            matmul.fp32_precision = "tf32"
        case _:
            torch.backends.fp32_precision = "tf32"
    assert matmul.fp32_precision == "tf32"
    with pytest.raises(RuntimeError, match="one"), ops.true_float32(CUDA):
        assert matmul.fp32_precision == "ieee"
        raise RuntimeError("one")
    assert matmul.fp32_precision == "tf32"
    if way == "inherited":
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    elif way != "fp32_precision":
        # What the older ways report is as consistent as before.
        assert matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"


def test_mixed_precision_settings_do_not_raise(precision: None) -> None:
    """torch raises when the older setting is read after the newer one was written; vLLM writes both."""
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = matmul.allow_tf32
    with ops.true_float32(CUDA):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"


def test_settings_are_left_alone_where_nothing_is_to_be_changed(precision: None) -> None:
    matmul = torch.backends.cuda.matmul
    for value in ("none", "ieee"):
        matmul.fp32_precision = value
        with ops.true_float32(CUDA):
            assert matmul.fp32_precision == value
        assert matmul.fp32_precision == value
    matmul.fp32_precision = "tf32"
    with ops.true_float32(torch.device("cpu")):
        assert matmul.fp32_precision == "tf32"


def test_a_cpus_bfloat16_products_are_off_inside(precision: None) -> None:
    matmul = torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision("medium")
    assert matmul.fp32_precision == "bf16"
    with ops.true_float32(torch.device("cpu")):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "bf16"
    assert torch.get_float32_matmul_precision() == "medium"
