"""The steer operator and its buffers: what they write is what the definition says, on the rows that were ordered."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from probes.steering import Operator, Update, Vector
from probes.steering.ablate import Ablate
from probes.steering.add import Add
from probes.steering.cap import Cap
from probes.steering.steer import END, Positions, Steer, stack_steers
from probes.taps import Tap
from serving.engine import steer_op
from serving.engine.layers import Convention, LayerClass, Stack
from serving.engine.steer_order import SteerOrder
from serving.engine.steers import SteerSet, install_steers

D_MODEL = 16
ROWS = 12
CPU = torch.device("cpu")
OPERATORS: list[Operator] = [Add(strength=0.4), Add(strength=-0.1), Ablate(strength=0.5), Cap(), Cap(strength=0.25)]


def make_vector(rng: np.random.Generator) -> Vector:
    direction = rng.standard_normal(D_MODEL)
    return Vector(direction / np.linalg.norm(direction), median_norm=4.0, mean=0.3, ceiling=0.5)


def make_steers(
    operators: Sequence[Operator], layers: Sequence[int], *, seed: int = 0, dose: float = 0.2
) -> list[Steer]:
    rng = np.random.default_rng(seed)
    return [
        Steer(f"s{number}", Tap(layer), operator.update(make_vector(rng), max_dose=dose), Positions.ALL, 0, 4.0)
        for number, (operator, layer) in enumerate(zip(operators, layers, strict=True))
    ]


def defined(stream: np.ndarray, updates: Sequence[Update], scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steers at one tap are parallel: all read the same stream. A scale multiplies a strength before the limit."""
    size = np.zeros_like(scale)
    for column, update in enumerate(updates):
        unlimited = Update(**{**{f: getattr(update, f) for f in Update.__slots__}, "limit": 1e9})
        size[:, column] = np.clip(unlimited.coefficient(stream) * scale[:, column], -update.limit, update.limit)
    return stream + sum(size[:, [c]] * update.write for c, update in enumerate(updates)), np.abs(size)


def tensors(steers: Sequence[Steer]) -> list[torch.Tensor]:
    (matrix,) = stack_steers(steers, d_model=D_MODEL, num_layers=4)
    return [torch.from_numpy(array) for array in (matrix.read, matrix.terms, matrix.write)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([0.05, 0.3, 5.0]))
def test_the_operator_is_the_definition(seed: int, fused: bool, dose: float) -> None:
    rng = np.random.default_rng(seed)
    steers = make_steers(OPERATORS, [0] * len(OPERATORS), seed=seed, dose=dose)
    hidden = rng.standard_normal((ROWS, D_MODEL)).astype(np.float32) * 2
    residual = rng.standard_normal((ROWS, D_MODEL)).astype(np.float32) * 3 if fused else None
    scale = rng.choice([0.0, 0.0, 0.5, 1.0, 2.0], size=(ROWS, len(steers)))
    scale[3] = 0
    doses = torch.full((ROWS, len(steers)), float("nan"))
    changed = steer_op.steer_rows(
        torch.from_numpy(hidden),
        torch.from_numpy(residual) if residual is not None else None,
        *tensors(steers),
        torch.from_numpy(scale.astype(np.float32)),
        doses,
    ).numpy()
    stream = hidden.astype(np.float64) + (residual if residual is not None else 0)
    expected, sizes = defined(stream, [steer.update for steer in steers], scale)
    np.testing.assert_allclose(changed + (residual if residual is not None else 0), expected, atol=2e-5)
    np.testing.assert_allclose(doses.numpy(), sizes, atol=2e-5)
    assert np.array_equal(changed[3], hidden[3])
    assert np.all(doses.numpy() <= dose * 4.0 * (1 + 1e-6))


def test_rows_that_are_not_written_to_keep_their_bits_whatever_stands_in_others() -> None:
    steers = make_steers([Cap(), Add(strength=0.1)], [0, 0])
    hidden = torch.randn(ROWS, D_MODEL)
    hidden[5] = float("nan")
    scale = torch.zeros(ROWS, 2)
    scale[2, 1] = scale[5, 0] = 1.0
    doses = torch.zeros(ROWS, 2)
    changed = steer_op.steer_rows(hidden, None, *tensors(steers), scale, doses)
    others = [row for row in range(ROWS) if row not in {2, 5}]
    assert torch.equal(changed[others], hidden[others])
    assert not torch.equal(changed[2], hidden[2])
    assert bool((doses[others] == 0).all())


def test_a_cap_is_the_identity_below_its_ceiling_bit_by_bit() -> None:
    (steer,) = make_steers([Cap()], [0])
    hidden = torch.randn(200, D_MODEL)
    above = hidden @ torch.from_numpy(steer.update.read).float() > 0.5
    doses = torch.zeros(200, 1)
    changed = steer_op.steer_rows(hidden, None, *tensors([steer]), torch.ones(200, 1), doses)
    assert 0 < int(above.sum()) < 200
    assert torch.equal(changed[~above], hidden[~above])
    assert bool((doses[above, 0] > 0).all())
    assert bool((doses[~above, 0] == 0).all())


def test_more_rows_than_the_buffer_are_refused() -> None:
    with pytest.raises(ValueError, match="a step has 3 rows, the steer's buffer 2"):
        steer_op.steer_rows(
            torch.zeros(3, D_MODEL), None, *tensors(make_steers([Cap()], [0])), torch.zeros(2, 1), torch.zeros(2, 1)
        )


class Layer(nn.Module):
    """A layer that returns what the convention says."""

    def __init__(self, convention: Convention) -> None:
        super().__init__()
        self.convention = convention

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> object:
        match self.convention:
            case Convention.PLAIN:
                return hidden
            case Convention.ALONE:
                return hidden, None
            case _:
                return hidden, residual


def stack_of(convention: Convention, layers: int = 4) -> Stack:
    return Stack({n: Layer(convention) for n in range(layers)}, LayerClass(convention, "", ()), None)


def install(convention: Convention = Convention.FUSED) -> tuple[Stack, SteerSet, list[Steer]]:
    stack = stack_of(convention)
    steers = make_steers([Add(strength=0.1), Cap(), Add(strength=-0.2)], [1, 3, 1])
    matrices = stack_steers(steers, d_model=D_MODEL, num_layers=4)
    return stack, install_steers(stack, matrices, num_steers=3, max_rows=ROWS, device=CPU), steers


@pytest.mark.parametrize("convention", list(Convention))
def test_each_convention_is_written_to_so_that_the_stream_moves_by_the_change(convention: Convention) -> None:
    stack, steers, made = install(convention)
    steers.arm({"a": [SteerOrder(0, 0, END)]}, ["a"], torch.tensor([0, 4]), torch.arange(4))
    hidden, residual = torch.randn(4, D_MODEL), torch.randn(4, D_MODEL)
    before = convention.stream(Layer(convention)(hidden, residual))
    after = convention.stream(stack.layers[1](hidden, residual))
    stream = [sum(part.double() for part in found if part is not None) for found in (before, after)]
    expected, _ = made[0].update.apply(stream[0].numpy(), np.ones(4, dtype=bool))
    np.testing.assert_allclose(stream[1].numpy(), expected, atol=1e-5)


def test_only_ordered_rows_of_ordered_requests_are_written_to_between_their_positions() -> None:
    stack, steers, _ = install()
    orders = {"a": [SteerOrder(0, 2, END)], "c": [SteerOrder(2, 0, 7, scale=0.5), SteerOrder(1, 8, END)]}
    positions = torch.tensor([0, 1, 2, 3, 40, 41, 6, 7, 8])
    steers.arm(orders, ["a", "b", "c"], torch.tensor([0, 4, 6, 9]), positions)
    hidden, residual = torch.randn(9, D_MODEL), torch.randn(9, D_MODEL)
    for layer in stack.layers.values():
        layer(hidden, residual)
    doses = steers.collect(9)
    assert doses is not None
    assert (doses[:, 0] > 0).tolist() == [False, False, True, True, False, False, False, False, False]
    assert (doses[:, 2] > 0).tolist() == [False] * 6 + [True, False, False]
    assert float(doses[6, 2]) == pytest.approx(0.5 * 0.2 * 4.0, rel=1e-5)


def test_a_layer_that_did_not_run_gives_no_dose_and_an_unsteered_step_none_at_all() -> None:
    stack, steers, _ = install()
    assert steers.collect(2) is None
    steers.arm({"a": [SteerOrder(0, 0, END), SteerOrder(1, 0, END)]}, ["a"], torch.tensor([0, 2]), torch.arange(2))
    stack.layers[1](torch.randn(2, D_MODEL), torch.randn(2, D_MODEL))
    doses = steers.collect(2)
    assert doses is not None
    assert bool(doses[:, 0].isfinite().all())
    assert bool(doses[:, 1].isnan().all())
    steers.arm({}, ["a"], torch.tensor([0, 2]), torch.arange(2))
    hidden, residual = torch.randn(2, D_MODEL), torch.randn(2, D_MODEL)
    returned = stack.layers[1](hidden, residual)
    assert returned[0] is hidden
    assert steers.collect(2) is None


def test_a_compiled_layer_steers_as_an_eager_one() -> None:
    stack, steers, _ = install()
    steers.arm({"a": [SteerOrder(0, 0, END)], "b": []}, ["a", "b"], torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0]))
    hidden, residual = torch.randn(3, D_MODEL), torch.randn(3, D_MODEL)
    eager = stack.layers[1](hidden, residual)[0]
    compiled = torch.compile(stack.layers[1], fullgraph=True, backend="aot_eager")(hidden, residual)[0]
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert torch.equal(eager[2], hidden[2])
    steers.arm({}, ["a"], torch.tensor([0, 3]), torch.arange(3))
    again = torch.compile(stack.layers[1], fullgraph=True, backend="aot_eager")(hidden, residual)[0]
    assert torch.equal(again, hidden)
