"""The repair's parts: moments, the ridge map, and its fold into the tensors of each kind."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge

import probes.detectors
from probes.artifact import Artifact, ArtifactError
from probes.card import Card
from probes.detectors import detector_kinds, load_detector
from probes.fit.reading.activations import ActivationReader
from probes.fit.realign.fold import fold, require_foldable
from probes.fit.realign.moments import Moments
from probes.fit.realign.repair import repair
from probes.fit.realign.ridge import LinearMap, RealignError, activations_r2, fit_map
from probes.fit.rows.example import Example
from probes.modelref import read_model_ref
from probes.taps import Tap
from serving.bench.rebuilds import rebuild, rounded
from tests.support.words import make_word_model
from tests.unit.artifacts import D_MODEL, linear_tensors, make_card, model_ref

WIDTH = 6
LAYERS = (0, 2)
NORM_KIND = '''
from probes.detectors.linear import Linear


class Normed(Linear):
    """Reads the norm too."""

    kind = "normed"
    reads_norm = True
'''

OTHER_KIND = '''
from probes.detectors.base import Layout
from probes.detectors.linear import Linear


class Theirs(Linear):
    """Squares what a linear probe says."""

    kind = "theirs"
    score_is_readout = False
    layout = {layout}

    def score(self, readouts):
        return super().score(readouts) ** 2
'''


def paired(rows: int, seed: int, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """New activations of very different sizes, and old ones that are linear in them but for some noise."""
    generator = np.random.default_rng(seed)
    new = generator.standard_normal((rows, WIDTH)) * np.logspace(0, 3, WIDTH) + 50.0
    matrix = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)) / np.logspace(0, 3, WIDTH)[:, None]
    return new, new @ matrix + 3.0 + noise * generator.standard_normal((rows, WIDTH))


def moments_of(new: np.ndarray, old: np.ndarray, chunk: int = 1000) -> Moments:
    found = Moments(WIDTH)
    for start in range(0, len(new), chunk):
        found.add(new[start : start + chunk], old[start : start + chunk])
    return found


@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
def test_moments_are_the_same_for_any_chunks(chunk: int) -> None:
    new, old = paired(300, 1)
    found = moments_of(new, old, chunk)
    found.add(new[:0], old[:0])
    joined = moments_of(new[:100], old[:100], chunk).joined(moments_of(new[100:], old[100:], chunk))
    whole = np.cov(np.concatenate([new, old], axis=1).T, bias=True) * 300
    for one in (found, joined, joined.joined(Moments(WIDTH))):
        assert one.count == 300
        np.testing.assert_allclose(one.new_mean, new.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(one.old_mean, old.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(one.new_scatter, whole[:WIDTH, :WIDTH], rtol=1e-9)
        np.testing.assert_allclose(one.old_scatter, whole[WIDTH:, WIDTH:], rtol=1e-9)
        np.testing.assert_allclose(one.cross_scatter, whole[:WIDTH, WIDTH:], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("penalty", [1e-4, 0.1, 3.0])
def test_the_map_is_ridge_regression_on_standardised_activations(penalty: float) -> None:
    new, old = paired(200, 2)
    fit, choose = moments_of(new[:150], old[:150]), moments_of(new[150:], old[150:])
    found = fit_map(fit, choose, np.eye(WIDTH)[:, :2], penalties=[penalty])
    units = (new - new.mean(axis=0)) / new.std(axis=0)
    known = Ridge(alpha=penalty * len(new)).fit(units, old)
    fresh, _ = paired(20, 3)
    expected = known.predict((fresh - new.mean(axis=0)) / new.std(axis=0))
    np.testing.assert_allclose(fresh @ found.matrix + found.offset, expected, rtol=1e-8)


def test_the_penalty_is_the_one_that_tells_other_rows_best() -> None:
    directions = np.eye(WIDTH)
    for noise, rows in ((1e-3, 40), (20.0, 12)):
        new, old = paired(rows, 4, noise)
        other = paired(2000, 5, noise)
        fit, choose = moments_of(new, old), moments_of(*other)
        penalties = (1e-8, 1e-3, 1e-1, 1.0, 10.0)
        errors = []
        for penalty in penalties:
            tried = fit_map(fit, Moments(WIDTH).joined(fit), directions, penalties=[penalty])
            missed = other[1] - other[0] @ tried.matrix - tried.offset
            errors.append(np.mean(missed.var(axis=0) / other[1].var(axis=0)))
        # Fitted on the same rows twice is fitted on them once, so these errors are those that choose.
        assert fit_map(fit, choose, directions, penalties=penalties).penalty == penalties[int(np.argmin(errors))]


def test_r2_is_that_of_the_rows_themselves() -> None:
    new, old = paired(400, 6, noise=1.0)
    found = fit_map(moments_of(new[:200], old[:200]), moments_of(new[200:300], old[200:300]), np.eye(WIDTH))
    rest, truth = new[300:], old[300:]
    missed = truth - rest @ found.matrix - found.offset
    expected = 1 - (missed**2).sum() / ((truth - truth.mean(axis=0)) ** 2).sum()
    assert activations_r2(found, moments_of(rest, truth)) == pytest.approx(expected, abs=1e-9)


def test_a_rotation_is_found_exactly() -> None:
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))[0]
    old = generator.standard_normal((200, WIDTH)) * np.logspace(0, 3, WIDTH)
    new = old @ basis
    found = fit_map(moments_of(new[:150], old[:150]), moments_of(new[150:], old[150:]), np.eye(WIDTH))
    np.testing.assert_allclose(found.matrix, basis.T, atol=1e-4)


def test_readouts_that_do_not_vary_teach_nothing() -> None:
    new, old = paired(50, 7)
    old[:, 0] = 1.0
    moments = moments_of(new, old)
    with pytest.raises(RealignError, match="do not vary"):
        fit_map(moments, moments, np.eye(WIDTH)[:, :1])
    # A direction that is never used does not hinder the others.
    assert np.isfinite(fit_map(moments, moments, np.eye(WIDTH)[:, :2]).matrix).all()


def tensors_of(kind: str, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Random tensors of a kind that can be repaired."""

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    units = {"mean": normal(D_MODEL), "scale": np.exp(normal(D_MODEL))}
    match kind:
        case "linear":
            return {**units, "direction": normal(D_MODEL), "bias": normal(1)}
        case "ensemble":
            taps = len(LAYERS)
            return {
                "mean": normal(taps, D_MODEL), "scale": np.exp(normal(taps, D_MODEL)),
                "direction": normal(taps, D_MODEL), "bias": normal(taps), "share": normal(taps),
            }  # fmt: skip
        case "attention":
            return {**units, "query": normal(3, D_MODEL), "value": normal(3, D_MODEL), "bias": normal(3)}
        case "multimax":
            return {**units, "value": normal(3, D_MODEL), "bias": normal(3)}
        case "mlp":
            # As many units as dimensions: constants and directions must not be mistaken for each other.
            return {
                **units, "hidden": normal(D_MODEL, D_MODEL), "hidden_bias": normal(D_MODEL),
                "out": normal(D_MODEL), "out_bias": normal(1),
            }  # fmt: skip
        case "drift":
            return {"direction": normal(D_MODEL), "scale": units["scale"]}
    raise AssertionError(kind)


def map_of(generator: np.random.Generator) -> LinearMap:
    return LinearMap(
        matrix=generator.standard_normal((D_MODEL, D_MODEL)),
        offset=generator.standard_normal(D_MODEL),
        mean=generator.standard_normal(D_MODEL),
        scale=np.exp(generator.standard_normal(D_MODEL)),
        penalty=0.1,
    )


def card_of(kind: str) -> Card:
    return make_card("d", kind=kind, layers=LAYERS if kind == "ensemble" else LAYERS[:1])


FOLDABLE = [kind for kind, cls in detector_kinds().items() if cls.layout is not None]


@pytest.mark.parametrize("kind", FOLDABLE)
def test_a_folded_detector_says_of_new_activations_what_it_said_of_the_mapped_ones(kind: str) -> None:
    generator = np.random.default_rng(1)
    card = card_of(kind)
    old = Artifact(Path("d.safetensors"), card, tensors_of(kind, generator))
    maps = {Tap.parse(tap): map_of(generator) for tap in card.taps}
    made = fold(old, maps, card.model_copy(update={"model": model_ref(id="new")}))
    assert made.card.model.id == "new"

    def scores(artifact: Artifact, activations: Mapping[Tap, np.ndarray]) -> np.ndarray:
        detector = load_detector(artifact)
        return detector.score(
            {part.tap: activations[part.tap] @ part.weight + part.bias for part in detector.directions()}
        )

    new = {tap: generator.standard_normal((50, D_MODEL)) * 10 for tap in maps}
    mapped = {tap: new[tap] @ found.matrix + found.offset for tap, found in maps.items()}
    before, after = scores(old, mapped), scores(made, new)
    if kind == "drift":  # only differences of its scores are judged
        before, after = before - before[0], after - after[0]
    if kind == "attention":  # and of its queries, the first three columns
        before[:, :3] -= before[0, :3]
        after[:, :3] -= after[0, :3]
    assert before.std() > 1
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9 * np.abs(before).max())


@pytest.mark.parametrize("kind", FOLDABLE)
def test_kinds_that_are_laid_out_otherwise_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later version read the same tensors in another way: twice as large."""
    generator = np.random.default_rng(1)
    card = card_of(kind)
    old = Artifact(Path("d.safetensors"), card, tensors_of(kind, generator))
    maps = {Tap.parse(tap): map_of(generator) for tap in card.taps}
    cls = detector_kinds()[kind]
    plain = cls.directions
    calls = []

    def other(self: probes.detectors.Detector) -> list[probes.detectors.Directions]:
        calls.append(self)
        factor = float(len(calls))
        return [probes.detectors.Directions(part.tap, part.weight * factor, part.bias) for part in plain(self)]

    monkeypatch.setattr(cls, "directions", other)
    with pytest.raises(RealignError, match="laid out"):
        fold(old, maps, card)


def test_kinds_that_read_norms_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "normed.py").write_text(NORM_KIND)
    monkeypatch.setattr(probes.detectors, "__path__", [*probes.detectors.__path__, str(tmp_path)])
    artifact = Artifact(Path("d.safetensors"), make_card(kind="normed"), linear_tensors(np.ones(D_MODEL)))
    with pytest.raises(RealignError, match="reads the norm of the stream"):
        require_foldable(artifact)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("None", "does not say which of its tensors hold directions"),
        ('Layout({"weight": "bias"})', "names weight, which the artifact does not hold"),
        ('Layout({"direction": "bias"}, by_tap=False)', ""),
    ],
)
def test_a_kind_of_others_is_repaired_if_it_says_how(
    layout: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(OTHER_KIND.format(layout=layout))
    monkeypatch.setattr(probes.detectors, "__path__", [*probes.detectors.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "probes.detectors.theirs", raising=False)
    generator = np.random.default_rng(2)
    card = make_card(kind="theirs")
    artifact = Artifact(Path("d.safetensors"), card, linear_tensors(generator.standard_normal(D_MODEL)))
    (tap,) = artifact.taps
    maps = {tap: map_of(generator)}
    if message:
        with pytest.raises(RealignError, match=message):
            fold(artifact, maps, card)
        return
    new = generator.standard_normal((20, D_MODEL))
    before, after = (load_detector(each) for each in (artifact, fold(artifact, maps, card)))
    mapped = new @ maps[tap].matrix + maps[tap].offset
    expected = before.score(before.read({tap: mapped}))
    np.testing.assert_allclose(after.score(after.read({tap: new})), expected, rtol=1e-9)


def test_kinds_that_are_not_known_are_refused() -> None:
    artifact = Artifact(Path("d.safetensors"), make_card(kind="none"), linear_tensors(np.ones(D_MODEL)))
    with pytest.raises(ArtifactError, match="does not know"):
        require_foldable(artifact)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("builds")
    make_word_model(home / "old")
    rebuild(home / "old", home / "new", rounded)
    shutil.copytree(home / "new", home / "tokens")
    path = home / "tokens" / "tokenizer.json"
    path.write_text(path.read_text().replace('"bake"', '"boil"'))
    return home


def reader_of(folder: Path, cache: Path) -> ActivationReader:
    model = read_model_ref(folder, model_id=folder.name, dtype="float32", cache_dir=cache)
    return ActivationReader(folder, model=model, layers=[0], cache_dir=cache, progress=lambda _: None)


def texts(count: int) -> list[Example]:
    words = ("bake", "bread", "plan", "party", "quickly", "today", "alone", "write")
    generator = np.random.default_rng(0)
    return [
        Example(text=" ".join(generator.choice(words, 6)), label=0, source="s", group=str(number))
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("new", "count", "floor", "message"),
    [
        ("old", 200, 0.8, "very weights"),
        ("tokens", 200, 0.8, "another tokenizer"),
        ("new", 12, 0.8, "at least 10 are needed"),
        ("new", 200, 1.1, "1.1 is the least"),
        ("new", 200, 0.8, ""),
    ],
)
def test_a_repair_that_cannot_be_trusted_is_refused(
    folders: Path, new: str, count: int, floor: float, message: str
) -> None:
    old = reader_of(folders / "old", folders)
    direction = np.random.default_rng(3).standard_normal(old.model.d_model)
    artifact = Artifact(Path("d.safetensors"), make_card(model=old.model), linear_tensors(direction))

    def run() -> float:
        found = repair(
            artifact, texts(count), old=old, new=reader_of(folders / new, folders), data_digest="0" * 64, floor=floor,
            created_by="a test", progress=lambda _: None,
        )  # fmt: skip
        return float(found.record["r2_score"])

    if message:
        with pytest.raises(RealignError, match=message):
            run()
    else:
        assert run() > 0.99
