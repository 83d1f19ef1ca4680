"""``scripts/gpu_check.sh``: what can be run of it without a GPU, and that every check of it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.bank import Bank
from probes.detectors.base import Detector, Directions, Float64
from probes.taps import Tap
from serving.engine import ops
from serving.gpu_check.__main__ import EXIT_FAILED, EXIT_IMPOSSIBLE, main
from serving.gpu_check.cost import Shape, measure_costs
from serving.gpu_check.operator import Case, check_operator
from serving.gpu_check.parity import agreement, drift
from serving.gpu_check.result import Checks, Cost

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
WITHOUT_VLLM = """\
#!{python}
import runpy, sys
for name in ("vllm", "transformers", "typer", "httpx"):
    sys.modules[name] = None
assert sys.argv[1:3] == ["-m", "serving.gpu_check"]
sys.argv[1:3] = []
sys.path.insert(0, {root!r})
runpy.run_module("serving.gpu_check", run_name="__main__", alter_sys=True)
"""
"""A Python that has torch, but neither vLLM nor what comes with it."""
real_read = ops.read
Read = Callable[..., None]


def test_the_first_tier_runs_on_a_cpu_with_torch_alone(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(WITHOUT_VLLM.format(python=sys.executable, root=str(ROOT)))
    python.chmod(0o755)
    command = ["scripts/gpu_check.sh", "--tier", "op", "--device", "cpu", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    content = json.loads((tmp_path / "gpu-check.json").read_text())
    outcomes = {check["name"]: check["outcome"] for check in content["checks"]}
    assert content["passed"]
    assert content["command"] == "scripts/gpu_check.sh --tier op --device cpu"
    assert "nothing of CUDA was run" in content["device"]
    skipped = {name for name, outcome in outcomes.items() if outcome == "skipped"}
    assert skipped - {"op.compiled"} == {"op.no_sync", "op.graph", "op.cost"}
    assert {f"op.exact.{kind}.8192" for kind in ("bfloat16", "float16", "float32")} <= outcomes.keys()
    assert f"{len(outcomes)} checks, 0 failed" in done.stdout
    assert (tmp_path / "gpu-check.md").read_text().startswith("# GPU check: no check failed")


def test_a_machine_without_cuda_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == EXIT_IMPOSSIBLE
    said = capsys.readouterr().out
    assert "there is no CUDA here" in said
    assert "--device cpu" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler, and at the widths that the tests name."""
    from serving.gpu_check import operator

    monkeypatch.setattr(operator.shutil, "which", lambda name: None)
    monkeypatch.setattr(operator, "WIDTHS", (576, 4096))


def rounded_read(*arguments: torch.Tensor) -> None:
    """What TF32 does: 10 bits of mantissa."""
    hidden, residual, weight, bias, out, fired = arguments
    values = [hidden.float() + residual.float(), weight]
    stream, short = (((value.contiguous().view(torch.int32) + 4096) & -8192).view(torch.float32) for value in values)
    real_read(stream, None, short.contiguous(), bias, out, fired)


def mixing_read(*arguments: torch.Tensor) -> None:
    hidden, residual, weight, bias, out, fired = arguments
    real_read(hidden + 0 * hidden.sum(), residual, weight, bias, out, fired)


def silent_read(*arguments: torch.Tensor) -> None:
    real_read(*arguments[:5], torch.zeros(1, dtype=torch.int64))


def broken_read(*arguments: torch.Tensor) -> None:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("read", "fails"),
    [
        (rounded_read, {"op.exact.bfloat16.4096", "op.exact.float32.576", "op.precision.high"}),
        (mixing_read, {"op.rows.padded"}),
        (silent_read, {"op.exact.float16.4096"}),
        (broken_read, {"op.exact.bfloat16", "op.precision", "op.rows"}),
    ],
)
def test_a_wrong_operator_is_found(quick: None, monkeypatch: pytest.MonkeyPatch, read: Read, fails: set[str]) -> None:
    monkeypatch.setattr(ops, "read", read)
    said: list[str] = []
    checks = Checks(said.append)
    check_operator(checks, CPU)
    failed = {check.name for check in checks.made if check.outcome == "failed"}
    assert fails <= failed
    assert any(line.startswith("failed") for line in said)


def test_a_failed_check_is_named_and_ends_with_status_1(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "read", mixing_read)
    assert main(["--tier", "op", "--device", "cpu", "--out", str(tmp_path)]) == EXIT_FAILED
    assert "FAILED op.rows.padded: NaN in 6 padded rows changed the others" in capsys.readouterr().out
    content = json.loads((tmp_path / "gpu-check.json").read_text())
    assert not content["passed"]
    assert (tmp_path / "gpu-check.md").read_text().startswith("# GPU check: 1 of")


def test_the_cases_see_tf32() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert Case(CPU, dtype).tf32_error() > 1e-5


def test_costs_are_measured_in_turns() -> None:
    tiny = Shape("tiny", 64, 96, 64, 128)
    said: list[str] = []
    costs = measure_costs(CPU, said.append, shapes=(tiny,), rows=(1, 8), directions=(4,))
    assert [(cost.shape, cost.rows, cost.directions) for cost in costs] == [("tiny", 1, 4), ("tiny", 8, 4)]
    assert all(0 < cost.layer_us < 1e6 and 0 < cost.tap_us < 1e6 for cost in costs)
    assert len(said) == len(costs)


def test_the_share_is_what_the_tap_adds() -> None:
    assert Cost("8B", 1, 64, layer_us=200.0, tapped_us=205.0, tap_us=4.0).share == pytest.approx(0.025)


class Some(Detector):
    """A few random directions at two taps."""

    kind = "some"

    @classmethod
    def from_artifact(cls, artifact: object, *, name: str) -> Some:
        return cls(name)

    def directions(self) -> tuple[Directions, ...]:
        rng = np.random.default_rng(1)
        return tuple(Directions(Tap(layer), rng.normal(size=(16, 3)), np.zeros(3)) for layer in (0, 1))

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        return np.sum([values.sum(axis=1) for values in readouts.values()], axis=0)


@pytest.fixture
def bank() -> Bank:
    return Bank([Some("some")], d_model=16, num_layers=2, capacity=4)


@pytest.fixture
def exact(bank: Bank) -> Float64:
    """What transformers would read: rows of two taps, the first row a massive one."""
    rng = np.random.default_rng(2)
    streams = rng.normal(size=(2, 40, 16))
    streams[:, 0] *= 100
    parts = []
    for matrix, stream in zip(bank.matrices, streams, strict=True):
        parts += [stream @ matrix.weight.astype(np.float64), (stream**2).sum(axis=1, keepdims=True)]
    return np.concatenate(parts, axis=1)


def holds(found: object) -> bool:
    one = found
    return all(getattr(one, pick) <= getattr(one, f"{pick}_allowed") for pick in ("row", "sink", "norm"))


def test_the_right_rows_agree_and_wrong_ones_do_not(bank: Bank, exact: Float64) -> None:
    rng = np.random.default_rng(3)

    def noisy(scale: float) -> Float64:
        # As rounding errors are: in proportion to what is rounded.
        return exact * (1 + scale * rng.normal(size=exact.shape))

    right = agreement(bank, noisy(1e-3).astype(np.float32), exact=exact, same_dtype=noisy(1e-3))
    assert holds(right)
    assert right.shifted > 2 * right.row_allowed
    assert holds(agreement(bank, exact.astype(np.float32), exact=exact, same_dtype=exact))
    # Rounding that float32 does not have.
    assert not holds(agreement(bank, noisy(1e-2), exact=exact, same_dtype=exact))
    swapped = exact.copy()
    swapped[[7, 8]] = swapped[[8, 7]]
    shifted = np.roll(exact, 1, axis=0)
    missing = exact.copy()
    missing[30, bank.used_columns()[0]] = np.nan
    for wrong in (swapped, shifted, missing, exact[:-1]):
        assert not holds(agreement(bank, wrong, exact=exact, same_dtype=noisy(1e-3)))


def test_drift_is_the_largest_of_all_rows(bank: Bank, exact: Float64) -> None:
    assert drift(bank, exact, exact) == 0
    moved = exact.copy()
    moved[9, bank.used_columns()[0]] += 1.0
    assert drift(bank, exact, moved) > 0.01


class Graph:
    """What a CUDA graph does: the same tensors again, whatever the names point to by now."""

    def __init__(self, work: Callable[[], None]) -> None:
        case: Case = work.__self__  # type: ignore[attr-defined]
        self._arguments = (case.hidden, case.residual, case.weight, case.bias, case.out, case.fired)
        work()

    def replay(self) -> None:
        ops.read(*self._arguments)


@pytest.mark.parametrize(("read", "holds_then"), [(real_read, True), (mixing_read, False), (silent_read, False)])
def test_graphs_are_judged_by_what_a_replay_leaves(
    monkeypatch: pytest.MonkeyPatch, read: Read, holds_then: bool
) -> None:
    """The logic of the check; a graph itself needs CUDA."""
    from serving.gpu_check import operator

    monkeypatch.setattr(operator, "captured", lambda work, pool: Graph(work))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ops, "read", read)
    checks = Checks(lambda text: None)
    operator._graph(checks, CPU)
    assert len(checks.made) == 7
    assert all(check.outcome == "passed" for check in checks.made) is holds_then


@pytest.mark.parametrize(
    ("low", "point", "high", "outcomes"),
    [
        (0.99, 1.0, 1.01, ("passed", "passed")),
        (0.97, 0.99, 1.0, ("passed", "passed")),
        (0.90, 0.95, 0.97, ("failed", "passed")),
        (0.95, 0.97, 1.0, ("skipped", "passed")),
        (1.04, 1.05, 1.06, ("passed", "failed")),
        (0.30, 1.0, 1.9, ("skipped", "skipped")),
    ],
)
def test_a_ratio_is_judged_by_its_interval(low: float, point: float, high: float, outcomes: tuple[str, str]) -> None:
    from serving.bench.statistics import Estimate, PairedRatio
    from serving.gpu_check.throughput import judge_ratio

    estimate = Estimate(point, low, high)
    checks = Checks(lambda text: None)
    ratio = PairedRatio((point,), estimate, estimate, 0.95)
    judge_ratio(checks, "rate", ratio, at_least=0.98)
    judge_ratio(checks, "first", ratio, at_most=1.03)
    assert tuple(check.outcome for check in checks.made) == outcomes
