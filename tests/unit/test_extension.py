"""A new aggregator and a new detector are one file each: found, used in a policy file, scored. Nothing else changes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import probes.aggregate
import probes.detectors
from monitor.monitor import Monitor
from monitor.policy import compile_plan
from probes.aggregate import AggregateError, Aggregator, aggregator_kinds, parse_aggregator
from probes.artifact import Artifact, ArtifactError, save_artifact
from probes.bank import Bank
from probes.card import Format
from probes.detectors import Detector, detector_kinds, load_detector
from probes.discovery import DiscoveryError, discover, group_of, installed_modules
from tests.unit.artifacts import D_MODEL, NUM_LAYERS, make_card, policy_text, rule, write_policy
from tests.unit.script import Script, chat

SECOND_LARGEST = '''
import numpy as np
from probes.aggregate.base import Aggregator, Scores


class SecondLargest(Aggregator):
    """The second largest score."""

    kind = "second_largest"
    floor: float = -1000.0

    @property
    def state_size(self) -> int:
        return 2

    @property
    def initial(self) -> float:
        return -np.inf

    def update(self, state: Scores, values: Scores) -> Scores:
        running = np.empty_like(values)
        for step, row in enumerate(values):
            ranked = np.sort(np.concatenate([state, row[:, None]], axis=1), axis=1)
            state[:] = ranked[:, 1:]
            running[step] = np.where(np.isfinite(state[:, 0]), np.maximum(state[:, 0], self.floor), -np.inf)
        return running
'''
PRODUCT = '''
import numpy as np
from probes.detectors.base import Detector, Directions
from probes.taps import Tap


class Product(Detector):
    """The product of two directions at one tap, plus one direction at another."""

    kind = "product"

    def __init__(self, name, taps, pair, single):
        super().__init__(name)
        self.taps, self.pair, self.single = taps, pair, single

    @classmethod
    def from_artifact(cls, artifact, *, name):
        width = artifact.card.model.d_model
        pair = np.stack([artifact.vector("left", width), artifact.vector("right", width)], axis=1)
        taps = [Tap.parse(tap) for tap in artifact.card.taps]
        return cls(name, taps, pair, artifact.vector("single", width)[:, None])

    def directions(self):
        return (
            Directions(self.taps[0], self.pair, np.array([0.5, 0.0])),
            Directions(self.taps[1], self.single, np.zeros(1)),
        )

    def score(self, readouts):
        left, right = readouts[self.taps[0]].T
        return left * right + readouts[self.taps[1]][:, 0]
'''
Extend = Callable[[ModuleType, str, str], None]
AMBIGUOUS = SECOND_LARGEST.replace('"second_largest"', '"max"')


@pytest.fixture
def extend(tmp_path: Path) -> Iterator[Extend]:
    """Adds a file to a package as a user would, by a folder on its path; takes it away again."""
    added: list[tuple[ModuleType, str]] = []

    def add(package: ModuleType, name: str, source: str) -> None:
        folder = tmp_path / package.__name__
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source)
        package.__path__.append(str(folder))
        added.append((package, name))
        importlib.invalidate_caches()

    yield add
    for package, name in added:
        package.__path__.remove(str(tmp_path / package.__name__))
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModuleType, str, str], None]]:
    """Installs a distribution that names a file of its own, as a wheel would; takes it away again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    installed: list[str] = []

    def add(package: ModuleType, target: str, source: str) -> None:
        name = f"theirs_{len(installed)}"
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group_of(package)}]\nkind = {target.format(module=name)}\n")
        installed.append(name)
        importlib.invalidate_caches()
        installed_modules.cache_clear()

    yield add
    for name in installed:
        sys.modules.pop(name, None)
    monkeypatch.undo()
    installed_modules.cache_clear()


def product_artifact(folder: Path) -> tuple[Artifact, dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    tensors = {name: rng.standard_normal(D_MODEL).astype(np.float32) for name in ("left", "right", "single")}
    card = make_card("pair", kind="product", layers=(1, 3), skip_first=0)
    return save_artifact(folder / "pair.safetensors", card, tensors), tensors


def test_before_and_after_the_file_exists(extend: Extend, tmp_path: Path) -> None:
    artifact, _ = product_artifact(tmp_path)
    with pytest.raises(AggregateError):
        parse_aggregator({"kind": "second_largest"})
    with pytest.raises(ArtifactError, match=r"'product'.*Known: .*linear"):
        load_detector(artifact)
    extend(probes.aggregate, "second_largest", SECOND_LARGEST)
    extend(probes.detectors, "product", PRODUCT)
    assert "second_largest" in aggregator_kinds()
    assert "product" in detector_kinds()
    assert load_detector(artifact).name == "pair"


def test_a_new_detector_and_aggregator_decide(extend: Extend, tmp_path: Path) -> None:
    extend(probes.aggregate, "second_largest", SECOND_LARGEST)
    extend(probes.detectors, "product", PRODUCT)
    product_artifact(tmp_path)
    artifact = Artifact.load(tmp_path / "pair.safetensors")
    when = "aggregate: {kind: second_largest, floor: -5}, above: {value: 2.0}"
    file = write_policy(tmp_path, policy_text(rule("twice", detector="pair", when=when), names=["pair"]))
    plan = compile_plan(file, {"pair": artifact}, d_model=D_MODEL, num_layers=NUM_LAYERS)
    monitor = Monitor(plan)
    script = Script(plan)

    # left * right + single = the wanted score, through the bank's columns
    def rows(scores: list[float]) -> np.ndarray:
        readouts = np.zeros((len(scores), plan.bank.width), dtype=np.float32)
        first, second = plan.bank.columns["pair"].values()
        readouts[:, first[0]], readouts[:, first[1]], readouts[:, second[0]] = 2.0, 1.0, np.array(scores) - 2.0
        return readouts

    for name, scores, action in (("one", [9.0, 1.0, 0.0], "allow"), ("two", [9.0, 1.0, 3.0], "block")):
        request = monitor.admit(name, num_prompt=3, policy=None, fmt=Format.CHAT, prompt=chat(3))
        monitor.observe(script.step([(name, range(3), rows(scores))]))
        assert request.action.action == action


def test_a_new_detector_reads_the_stream_as_it_says(extend: Extend, tmp_path: Path) -> None:
    extend(probes.detectors, "product", PRODUCT)
    artifact, tensors = product_artifact(tmp_path)
    bank = Bank([load_detector(artifact)], d_model=D_MODEL, num_layers=NUM_LAYERS, capacity=3)
    rng = np.random.default_rng(6)
    low, high = rng.standard_normal((2, 10, D_MODEL))
    readouts = np.zeros((10, bank.width), dtype=np.float32)
    for number, (matrix, stream) in enumerate(zip(bank.matrices, (low, high), strict=True)):
        start = number * (bank.capacity + 1)
        readouts[:, start : start + bank.capacity] = stream.astype(np.float32) @ matrix.weight + matrix.bias
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    expected = (low @ wide["left"] + 0.5) * (low @ wide["right"]) + high @ wide["single"]
    assert np.allclose(bank.score(readouts)[:, 0], expected, atol=1e-5 * np.abs(expected).max())


def test_two_files_of_one_kind_are_refused(extend: Extend) -> None:
    extend(probes.aggregate, "other_max", AMBIGUOUS)
    with pytest.raises(DiscoveryError, match="both define the kind 'max'"):
        aggregator_kinds()


def test_discovery_leaves_out_what_is_imported_or_abstract() -> None:
    found = discover(probes.aggregate, Aggregator)
    assert list(found) == sorted(found)
    assert Aggregator not in found.values()
    assert Detector not in discover(probes.detectors, Detector).values()
    with pytest.raises(TypeError):
        found["x"] = Aggregator  # type: ignore[index]


def test_another_distribution_adds_kinds_by_entry_points(install: Extend, tmp_path: Path) -> None:
    assert group_of(probes.aggregate) == "telltale.aggregate"
    artifact, _ = product_artifact(tmp_path)
    install(probes.aggregate, "{module}", SECOND_LARGEST)
    install(probes.detectors, "{module}", PRODUCT)
    assert parse_aggregator({"kind": "second_largest"}).kind == "second_largest"
    assert load_detector(artifact).name == "pair"


@pytest.mark.parametrize(
    ("target", "message"),
    [("not_there_at_all", "cannot be imported"), ("{module}:SecondLargest", "is no module")],
)
def test_an_entry_point_that_leads_nowhere_is_named(target: str, message: str, install: Extend) -> None:
    install(probes.aggregate, target, SECOND_LARGEST)
    with pytest.raises(DiscoveryError, match=f"entry point 'kind' of theirs_0 in telltale.aggregate.*{message}"):
        aggregator_kinds()


def test_an_installed_kind_does_not_replace_one_of_ours(install: Extend) -> None:
    install(probes.aggregate, "{module}", AMBIGUOUS)
    with pytest.raises(DiscoveryError, match="both define the kind 'max'"):
        aggregator_kinds()
