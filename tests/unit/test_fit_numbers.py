# ruff: noqa: S311 - seeded draws of examples
import numpy as np
import pytest
from scipy.stats import binom

from probes.aggregate import parse_aggregator
from probes.card import Calibration, Format, Stage
from probes.fit.calibration.calibrate import CalibrationError, calibrate, shortfall
from probes.fit.evaluation.evaluate import at_threshold, limits_of
from probes.fit.evaluation.measure import auroc, measure, positive_value, tpr_at_fpr
from probes.fit.fitters.logistic import Logistic
from probes.fit.rows.example import Example
from probes.fit.rows.split import Fold, hold_out, length_matched_pairs, make_folds, match_negatives, vary_form
from probes.fit.training.search import Candidate, Features, choose
from probes.threshold import allowed_exceedances, benign_needed, threshold_for
from tests.support.planted_rows import planted


def rows(count: int, label: int = 0, source: str = "s") -> list[Example]:
    return [
        Example(text=f"text {i} " + "x" * (i % 60), label=label, source=source, group=f"{source}/{i}")
        for i in range(count)
    ]


def calibrated(statistics: np.ndarray, target: float = 0.01) -> Calibration:
    return calibrate(
        statistics,
        rows(statistics.size),
        stage=Stage.PROMPT,
        text_format=Format.CHAT,
        aggregate=parse_aggregator({"kind": "rolling", "window": 3}),
        target_fpr=target,
        confidence=0.95,
    )


@pytest.mark.parametrize(
    ("count", "target", "allowed"),
    [
        (300, 0.01, 0),
        (500, 0.01, 1),
        (1000, 0.01, 4),
        (2000, 0.01, 12),
        (5000, 0.01, 38),
        (1000, 0.005, 1),
        (5000, 0.001, 1),
    ],
)
def test_allowed_exceedances_of_the_literature(count: int, target: float, allowed: int) -> None:
    assert allowed_exceedances(count, target) == allowed
    assert binom.cdf(allowed, count, target) <= 0.05 < binom.cdf(allowed + 1, count, target)


def test_too_few_requests_are_not_certified() -> None:
    assert benign_needed(0.01) == 299
    found = calibrated(np.arange(200.0))
    assert not found.certified
    assert found.threshold == 199.0
    assert "99 more benign requests needed" in shortfall(found)
    assert shortfall(calibrated(np.arange(299.0))) == ""


def test_the_card_holds_enough_for_targets_up_to_five_percent() -> None:
    statistics = np.random.default_rng(0).standard_normal(2000)
    found = calibrated(statistics)
    assert found.threshold == np.sort(statistics)[::-1][12]
    assert np.sum(statistics > found.threshold) == 12
    loose = threshold_for(found.top_scores, found.num_benign, 0.05)
    assert loose is not None
    assert np.sum(statistics > loose) == allowed_exceedances(2000, 0.05)


def test_windows_that_never_fill_do_not_fire_and_nan_is_refused() -> None:
    statistics = np.where(np.arange(400) < 350, -np.inf, np.arange(400.0))
    assert calibrated(statistics).threshold == 399.0
    with pytest.raises(CalibrationError, match="1 of 400"):
        calibrated(np.where(np.arange(400) == 3, np.nan, 0.0))


def test_the_promise_is_kept_as_often_as_stated() -> None:
    generator = np.random.default_rng(7)
    kept = [
        (1.0 - calibrated(generator.random(600)).threshold) <= 0.01  # the true rate above t of a uniform score is 1 - t
        for _ in range(400)
    ]
    assert np.mean(kept) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 400)


def test_the_search_finds_the_layer_that_knows() -> None:
    features, labels = planted(400)
    noise = np.random.default_rng(1).standard_normal(features.shape).astype(np.float32)
    folds = [
        Fold(str(k), tuple(i for i in range(400) if i // 80 != k), tuple(range(80 * k, 80 * k + 80))) for k in range(5)
    ]
    choice = choose(
        lambda setting: Features(features if setting.layers == (1,) else noise, np.ones(400, dtype=np.bool_)),
        labels,
        folds,
        layers=[0, 1],
        aggregates=[parse_aggregator({"kind": "last"})],
        fitters=[Logistic(inverse_penalty=c) for c in (0.001, 0.01, 0.1)],
        progress=lambda _: None,
    )
    assert choice.candidate.layers == (1,)
    assert len(choice.fold_scores) == 5
    assert len(choice.table) == 6


def test_an_ensemble_wins_where_each_layer_knows_a_part() -> None:
    """Two layers with noise of their own: their average tells more than either, and the blind third is left out."""
    generator = np.random.default_rng(7)
    labels = np.arange(400) % 2
    seen = [generator.standard_normal((400, 6)).astype(np.float32) for _ in range(3)]
    for layer in (0, 2):
        seen[layer][:, 0] += 1.2 * labels
    folds = [
        Fold(str(k), tuple(i for i in range(400) if i // 80 != k), tuple(range(80 * k, 80 * k + 80))) for k in range(5)
    ]
    search = {
        "layers": [0, 1, 2],
        "aggregates": [parse_aggregator({"kind": "last"})],
        "fitters": [Logistic(inverse_penalty=0.01)],
        "progress": lambda _: None,
    }

    def features_at(setting: Candidate) -> Features:
        return Features(np.concatenate([seen[i] for i in setting.layers], axis=1), np.ones(400, dtype=np.bool_))

    choice = choose(features_at, labels, folds, ensembles=[2, 3], **search)
    assert choice.candidate.layers == (0, 2)
    alone = choose(features_at, labels, folds, **search)
    assert len(alone.candidate.layers) == 1
    assert choice.table[choice.candidate] > alone.table[alone.candidate] + 0.02


def test_auroc_and_tpr_by_hand() -> None:
    labels = np.array([0, 0, 1, 1])
    assert auroc(np.array([0.0, 1.0, 1.0, 2.0]), labels) == pytest.approx(0.875)
    assert tpr_at_fpr(np.array([0.0, 1.0, 1.0, 2.0]), labels) == 0.5
    assert auroc(np.array([-np.inf, 0.0, -np.inf, 1.0]), labels) == pytest.approx(0.625)
    quality = measure(np.array([0.0, 1.0, 2.0, 3.0]), labels, seed=0)
    assert quality.auroc.rounded() == [1.0, 1.0, 1.0]
    scores, truth = np.random.default_rng(2).standard_normal(300), (np.arange(300) < 120).astype(np.int64)
    wide = measure(scores + truth, truth, seed=0)
    assert wide.auroc.low < wide.auroc.value < wide.auroc.high
    # Hanley and McNeil's standard error, times 1.96 on each side.
    assert wide.auroc.high - wide.auroc.low == pytest.approx(0.103, abs=0.02)
    assert positive_value(0.9, 0.01, 0.001) == pytest.approx(0.0826, abs=1e-4)


def test_report_at_the_threshold() -> None:
    made, scores = calibrated(np.arange(400.0)), np.array([400.0, 1.0, 1.0])
    found = at_threshold(made, {"set": (scores, limits_of(made, [5, 9, 9]), np.array([1, 1, 0]))})
    assert found["set"]["fired_positive"] == [1, 2]
    assert found["set"]["fired_negative"] == [0, 1]


def test_sides_are_decided_by_group_and_folds_by_source() -> None:
    import random

    kept, held = hold_out(rows(2000), 0.3, salt="a")
    assert not {r.group for r in kept} & {r.group for r in held}
    assert 0.25 < len(held) / 2000 < 0.35
    positives = rows(50, 1, "p") + rows(50, 1, "q")
    positives = [Example(text=r.text, label=1, source=r.source, group=r.source) for r in positives]
    everything = positives + rows(400)
    folds = make_folds(everything, random.Random(0))
    assert [fold.name for fold in folds] == ["p", "q"]
    for fold in folds:
        assert not set(fold.train) & set(fold.test)
        assert {everything[i].group for i in fold.test if everything[i].label} == {fold.name}
        assert fold.name not in {everything[i].group for i in fold.train}
    assert len(make_folds(rows(100, 1, "one-set") + rows(100), random.Random(0))) == 5


def test_negatives_follow_form_and_length() -> None:
    import random

    positives = [Example(text="a" * 30 + "?", label=1, source="p", group="p")] * 10
    questions = [Example(text="b" * 29 + f"{i % 10}?", label=0, source="q", group=str(i)) for i in range(50)]
    others = [Example(text="c" * 90, label=0, source="r", group=str(i)) for i in range(50)]
    chosen = match_negatives(positives, questions + others, 2.0, random.Random(0))
    assert len(chosen) == 20
    assert {row.source for row in chosen} == {"q"}
    varied = vary_form([Example(text="Write a poem", label=0, source="s", group="g")] * 50, 1.0, random.Random(0))
    assert len({row.text for row in varied}) > 4
    matched = length_matched_pairs(positives + questions + others, 0.1)
    assert len(matched) == 20


def test_vary_form_is_blind_to_the_label() -> None:
    import random

    def vary(label: int) -> list[str]:
        source = [Example(text=t, label=label, source="s", group="g") for t in ("Write x", "Is it so?", "Walk home")]
        return [row.text for row in vary_form(source, 0.8, random.Random(5))]

    assert vary(0) == vary(1)
