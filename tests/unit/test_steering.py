"""Steering operators: each does what its formula says to the component along its direction, and nothing else."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

import probes.steering
from probes.steering import Operator, Sign, SteerError, Update, Vector, operator_kinds, parse_operator
from probes.steering.ablate import Ablate
from probes.steering.add import Add
from probes.steering.cap import Cap

D_MODEL = 12
NO_LIMIT = 1e9
OPERATORS: list[Operator] = [
    Add(strength=0.3),
    Add(strength=-0.1),
    Ablate(),
    Ablate(strength=0.25),
    Cap(),
    Cap(strength=0.5),
]
each_operator = pytest.mark.parametrize(
    "operator", OPERATORS, ids=lambda operator: f"{operator.kind}-{operator.strength}"
)

CLAMP = '''
from pydantic import Field

from probes.steering.base import Operator, Sign, Update, Vector


class Clamp(Operator):
    """Set the component to a target, wherever it is positive."""

    kind = "clamp"
    target: float = Field(default=2.0)

    @property
    def sign(self) -> Sign:
        return Sign.MORE

    def update(self, vector: Vector, *, max_dose: float) -> Update:
        return Update(
            read=vector.direction, write=vector.direction, limit=max_dose * vector.median_norm,
            constant=self.target, rectified=-1.0,
        )
'''


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, Vector]:
    """(n, d_model) rows of mixed magnitude and a vector."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((draw(st.integers(1, 20)), D_MODEL)) * 10.0 ** draw(st.integers(-2, 3))
    direction = rng.standard_normal(D_MODEL)
    mean = draw(st.floats(-5, 5))
    return rows, Vector(direction / np.linalg.norm(direction), draw(st.floats(0.1, 100)), mean, mean + 1.5)


def applied(
    operator: Operator, rows: np.ndarray, vector: Vector, max_dose: float = NO_LIMIT
) -> tuple[np.ndarray, np.ndarray]:
    return operator.update(vector, max_dose=max_dose).apply(rows, np.ones(len(rows), dtype=bool))


@settings(max_examples=50, deadline=None)
@given(case=cases(), strength=st.floats(0.01, 1.0))
def test_components_are_those_of_the_formulas(case: tuple[np.ndarray, Vector], strength: float) -> None:
    rows, vector = case
    before, scale = rows @ vector.direction, 1.0 + np.abs(rows).max()
    expected = {
        "add": before + strength * vector.median_norm,
        "ablate": before - strength * (before - vector.mean),
        "cap": before - strength * np.maximum(0.0, before - vector.ceiling),
    }
    for kind, component in expected.items():
        steered, _ = applied(parse_operator(kind, {"strength": strength}), rows, vector)
        np.testing.assert_allclose(steered @ vector.direction, component, atol=1e-9 * scale)


@each_operator
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_nothing_moves_beside_the_direction(operator: Operator, case: tuple[np.ndarray, Vector]) -> None:
    rows, vector = case
    steered, dose = applied(operator, rows, vector)
    moved = steered - rows
    beside = moved - (moved @ vector.direction)[:, None] * vector.direction
    scale = 1.0 + np.abs(rows).max()
    assert np.abs(beside).max() <= 1e-9 * scale
    np.testing.assert_allclose(dose, np.linalg.norm(moved, axis=1), atol=1e-9 * scale)


@each_operator
@settings(max_examples=25, deadline=None)
@given(case=cases(), max_dose=st.floats(0.001, 1.0))
def test_no_dose_is_above_the_limit(operator: Operator, case: tuple[np.ndarray, Vector], max_dose: float) -> None:
    rows, vector = case
    free, free_dose = applied(operator, rows, vector)
    steered, dose = applied(operator, rows, vector, max_dose)
    limit = max_dose * vector.median_norm
    assert np.all(dose <= limit)
    np.testing.assert_array_equal(dose, np.minimum(free_dose, limit))
    inside = free_dose <= limit
    np.testing.assert_array_equal(steered[inside], free[inside])


@each_operator
@given(case=cases())
@settings(max_examples=10, deadline=None)
def test_rows_that_are_not_meant_keep_every_bit(operator: Operator, case: tuple[np.ndarray, Vector]) -> None:
    rows, vector = case
    where = np.arange(len(rows)) % 2 == 0
    steered, dose = operator.update(vector, max_dose=NO_LIMIT).apply(rows, where)
    assert np.array_equal(steered[~where], rows[~where])
    assert not dose[~where].any()


@given(case=cases())
@settings(max_examples=50, deadline=None)
def test_a_cap_leaves_rows_below_its_ceiling_bit_for_bit_and_acts_above_it(case: tuple[np.ndarray, Vector]) -> None:
    rows, vector = case
    above = rows + (vector.ceiling + 1.0 - rows @ vector.direction)[:, None] * vector.direction
    below = rows + (vector.ceiling - 1.0 - rows @ vector.direction)[:, None] * vector.direction
    steered, dose = applied(Cap(), below, vector)
    assert np.array_equal(steered, below)
    assert not dose.any()
    _, dose = applied(Cap(), above, vector)
    np.testing.assert_allclose(dose, 1.0, atol=1e-6 * (1.0 + np.abs(rows).max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": np.full(D_MODEL, 1.0)}, "the length 3.4641; it must be 1"),
        ({"direction": np.full(D_MODEL, np.nan)}, "the length nan"),
        ({"median_norm": 0.0}, "the median norm is 0.0"),
        ({"median_norm": np.inf}, "the median norm is inf"),
        ({"mean": np.nan}, "the mean along the direction is nan"),
        ({"ceiling": np.inf}, "the ceiling along the direction is inf"),
    ],
)
def test_a_vector_that_says_another_dose_than_it_gives_is_refused(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {"direction": np.eye(D_MODEL)[0], "median_norm": 1.0, "mean": 0.0, "ceiling": 1.0}
    Vector(**parts)  # type: ignore[arg-type]
    with pytest.raises(SteerError, match=message):
        Vector(**parts | change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("add", {}, "strength"),
        ("add", {"strength": 0.0}, "changes nothing"),
        ("add", {"strength": 2.1}, "less than or equal to 2"),
        ("ablate", {"strength": 1.1}, "less than or equal to 1"),
        ("cap", {"strength": 0.0}, "greater than 0"),
        ("cap", {"strength": float("nan")}, "finite"),
        ("cap", {"tau": 1.0}, "Extra inputs"),
    ],
)
def test_parameters_are_checked(kind: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse_operator(kind, parameters)


def test_an_unknown_operator_is_refused_with_what_was_meant() -> None:
    with pytest.raises(SteerError, match=r"'abblate' is not known.*'ablate'"):
        parse_operator("abblate", {})


def test_more_or_less_of_it() -> None:
    assert [operator.sign for operator in OPERATORS] == [Sign.MORE, *[Sign.LESS] * 5]


def test_an_operator_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clamp.py").write_text(CLAMP)
    monkeypatch.setattr(probes.steering, "__path__", [*probes.steering.__path__, str(tmp_path)])
    latent = {"cap_latent", "raise_latent", "reduce_latent", "set_latent"}
    assert set(operator_kinds()) == {"ablate", "add", "cap", "clamp"} | latent
    vector = Vector(np.eye(D_MODEL)[3], 1.0, 0.0, 1.0)
    update: Update = parse_operator("clamp", {"target": 4.0}).update(vector, max_dose=NO_LIMIT)
    rows = np.random.default_rng(0).standard_normal((50, D_MODEL))
    steered, _ = update.apply(rows, np.ones(50, dtype=bool))
    positive = rows[:, 3] > 0
    np.testing.assert_allclose(steered[positive, 3], 4.0)
    np.testing.assert_allclose(steered[~positive, 3], rows[~positive, 3] + 4.0)
