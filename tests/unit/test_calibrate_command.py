"""``telltale calibrate`` from the command line to a policy that may block: on a tiny random model, made here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from typer.testing import CliRunner, Result

from monitor.policy import compile_plan
from monitor.yaml_file import PolicyError, read_policy_file
from probes.aggregate.ema import Ema
from probes.aggregate.max import Max
from probes.artifact import Artifact, save_artifact
from probes.card import Calibration, Format, Stage
from probes.errors import TelltaleError
from probes.fit.reading.scores import open_reader, read_scores, statistics_of_requests
from probes.fit.rows.example import text_digest
from probes.fit.sources.jsonl import read_jsonl
from probes.modelref import read_model_ref
from probes.threshold import allowed_exceedances, benign_needed
from serving.cli import app
from tests.support.kinds import AGGREGATE, LAYERS, MAKE
from tests.support.words import D_MODEL, NUM_LAYERS, WORDS
from tests.unit.artifacts import calibration, linear_tensors, make_card, policy_text, rule

BENIGN = 700


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own; threads cost more than they bring on matrices this small."""
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def benign(tmp_path: Path) -> Path:
    path = tmp_path / "benign.jsonl"
    rng = np.random.default_rng(0)
    lines = [
        {"prompt": " ".join(rng.choice(WORDS, rng.integers(2, 20))), "response": " ".join(rng.choice(WORDS, 4))}
        for _ in range(BENIGN)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def detector(model_dir: Path, folder: Path, name: str, *, calibrations: tuple[Calibration, ...] = ()) -> Path:
    model = read_model_ref(model_dir, model_id="words", dtype="float32")
    formats = [Format.CHAT]
    card = make_card(name, layers=(1,), model=model, formats=formats, calibrations=calibrations)
    direction = np.random.default_rng(len(name)).standard_normal(D_MODEL)
    return save_artifact(folder / f"{name}.safetensors", card, linear_tensors(direction)).path


def run(model_dir: Path, benign: Path, paths: list[Path], *options: str) -> Result:
    arguments = ["calibrate", *map(str, paths), "--benign", str(benign), "--model", str(model_dir), *options]
    return CliRunner().invoke(app, arguments)


def test_a_calibrated_detector_may_block(model_dir: Path, benign: Path, tmp_path: Path) -> None:
    path = detector(model_dir, tmp_path, "harm", calibrations=(calibration(Stage.STREAM),))
    policy = tmp_path / "telltale.yaml"
    policy.write_text(policy_text(rule("r")))

    def compiled() -> dict[Format, float]:
        plan = compile_plan(
            read_policy_file(policy), {"harm": Artifact.load(path)}, d_model=D_MODEL, num_layers=NUM_LAYERS
        )
        return dict(plan.checks[0].thresholds)

    with pytest.raises(PolicyError, match=r"telltale calibrate harm.safetensors --benign FILE.jsonl --stage prompt"):
        compiled()
    options = ("--format", "raw", "--format", "chat", "--aggregate", "ema,alpha=0.3", "--buckets", "off")
    done = run(model_dir, benign, [path], *options)
    assert done.exit_code == 0, done.output
    card = Artifact.load(path).card
    assert card.calibrations[0] == calibration(Stage.STREAM)
    assert set(card.formats) == set(Format)
    found = {item.format: item for item in card.calibrations[1:]}
    assert compiled() == {fmt: item.threshold for fmt, item in found.items()}
    for fmt, item in found.items():
        assert (item.aggregate, item.certified, item.num_benign) == (Ema(alpha=0.3), True, BENIGN)
        assert np.sum(statistics(path, model_dir, benign, item, tmp_path) > item.threshold) == allowed_exceedances(
            BENIGN, 0.01
        )
        assert f"{item.threshold:.4g}" in done.output
        assert item.buckets == ()
        assert fmt in card.formats
    again = run(model_dir, benign, [path], *options, "--target-fpr", "0.05")
    assert again.exit_code == 0, again.output
    renewed = Artifact.load(path).card
    assert len(renewed.calibrations) == 3
    assert {item.target_fpr for item in renewed.calibrations[1:]} == {0.05}


def statistics(path: Path, model_dir: Path, benign: Path, item: Calibration, cache: Path) -> np.ndarray:
    artifact = Artifact.load(path)
    reader = open_reader([artifact], model_dir, model=artifact.card.model, cache_dir=cache, progress=str)
    (scores,) = read_scores(
        [artifact], read_jsonl(benign, label=0), reader, text_format=item.format, stage=item.stage, cache_dir=cache,
        label="rows",
    )  # fmt: skip
    return statistics_of_requests(item.aggregate, item.stage, scores)


def test_too_few_requests_are_said_and_only_flag(model_dir: Path, benign: Path, tmp_path: Path) -> None:
    path = detector(model_dir, tmp_path, "harm")
    done = run(model_dir, benign, [path], "--target-fpr", "0.001", "--aggregate", "max")
    assert done.exit_code == 0, done.output
    missing = benign_needed(0.001) - BENIGN
    assert f"not certifiable: {missing} more benign requests needed" in " ".join(done.output.split())
    (found,) = Artifact.load(path).card.calibrations
    assert not found.certified


def test_lengths_and_replies_and_probabilities(model_dir: Path, benign: Path, tmp_path: Path) -> None:
    path = detector(model_dir, tmp_path, "harm", calibrations=(calibration(aggregate=Max()),))
    labelled = tmp_path / "labelled.jsonl"
    lines = [json.loads(line) | {"label": number % 2} for number, line in enumerate(benign.read_text().split("\n"))]
    labelled.write_text("\n".join(json.dumps(line) for line in lines[:100]))
    out = tmp_path / "out"
    options = ("--labelled", str(labelled), "--out", str(out), "--format", "raw", "--stage", "response")
    done = run(model_dir, benign, [path], *options)
    assert done.exit_code == 0, done.output
    assert Artifact.load(path).card.formats == (Format.CHAT,)  # the original stays as it was
    found = Artifact.load(out / "harm.safetensors").card.calibrations[-1]
    assert (found.stage, found.aggregate) == (Stage.RESPONSE, Max())
    # The maximum grows with length, and 700 requests are enough for two buckets.
    assert len(found.buckets) == 2
    assert sum(bucket.num_benign for bucket in found.buckets) == BENIGN
    assert all(bucket.num_benign >= benign_needed(0.01) and bucket.certified for bucket in found.buckets)
    assert found.platt is not None
    assert (found.platt.num_positive, found.platt.num_negative) == (50, 50)
    assert "calibration error" in done.output


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_every_kind_is_calibrated(model_dir: Path, benign: Path, tmp_path: Path, kind: str) -> None:
    model = read_model_ref(model_dir, model_id="words", dtype="float32")
    tensors = MAKE[kind](np.random.default_rng(0), D_MODEL)
    path = tmp_path / f"{kind}.safetensors"
    save_artifact(path, make_card(kind, kind=kind, layers=LAYERS.get(kind, (1,)), model=model), tensors)
    aggregate = AGGREGATE.get(kind, Max())
    words = ",".join(
        [aggregate.kind, *(f"{key}={value}" for key, value in aggregate.config().items() if key != "kind")]
    )
    done = run(model_dir, benign, [path], "--aggregate", words, "--stage", "response", "--target-fpr", "0.05")
    assert done.exit_code == 0, done.output
    card = Artifact.load(path).card
    assert {item.format: item.aggregate for item in card.calibrations} == dict.fromkeys(Format, aggregate)
    for item in card.calibrations:
        found = statistics(path, model_dir, benign, item, tmp_path)
        allowed = allowed_exceedances(BENIGN, 0.05)
        assert allowed is not None
        assert np.sum(found > item.threshold) <= allowed < np.sum(found >= item.threshold)  # some requests are the same


def test_a_total_is_divided(model_dir: Path, benign: Path, tmp_path: Path) -> None:
    paths = [detector(model_dir, tmp_path, name) for name in ("one", "other")]
    done = run(model_dir, benign, paths, "--total-fpr", "0.02", "--weights", "3,1", "--aggregate", "last")
    assert done.exit_code == 0, done.output
    targets = [Artifact.load(path).card.calibrations[0].target_fpr for path in paths]
    assert targets == pytest.approx([0.015, 0.005])
    assert run(model_dir, benign, paths, "--share", "0.5", "--aggregate", "last").exit_code == 0
    assert Artifact.load(paths[0]).card.calibrations[0].target_fpr == 0.005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "never been calibrated.*--aggregate"),
        (("--aggregate", "emma"), "not known. Did you mean 'ema'"),
        (("--aggregate", "ema,alpha"), "no NAME=VALUE"),
        (("--aggregate", "ema,alpha=much"), "alpha: .*valid number"),
        (("--aggregate", "ema,alpha=2"), "alpha: .*less than or equal to 1"),
        (("--aggregate", "attention,heads=2"), "does not take the one number"),
        (("--stage", "promt"), "Did you mean 'prompt'"),
        (("--format", "chatt"), "Did you mean 'chat'"),
        (("--method", "pack"), "Did you mean 'pac'"),
        (("--buckets", "9,4"), "ascending"),
        (("--buckets", "some"), "auto, off or lengths"),
        (("--weights", "1"), "give --total-fpr"),
        (("--total-fpr", "0.1", "--share", "0.5"), "leave --target-fpr and --share out"),
        (("--total-fpr", "0.1", "--weights", "1,2"), "2 numbers for 1 detectors"),
        (("--total-fpr", "0.1", "--weights", "0"), "above 0"),
    ],
)
def test_options_that_make_no_sense(
    model_dir: Path, benign: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    path = detector(model_dir, tmp_path, "harm")
    before = path.with_name("harm.card.json").read_bytes()
    done = run(model_dir, benign, [path], *options)
    assert isinstance(done.exception, TelltaleError), done.output
    with pytest.raises(TelltaleError, match=message):
        raise done.exception
    assert path.with_name("harm.card.json").read_bytes() == before


def test_rows_that_cannot_be_used(
    model_dir: Path, benign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = detector(model_dir, tmp_path, "harm")

    def failure(text: str, *options: str) -> str:
        benign.write_text(text)
        done = run(model_dir, benign, [path], "--aggregate", "max", *options)
        assert isinstance(done.exception, TelltaleError), done.output
        return str(done.exception)

    assert "benign.jsonl: there are no requests in it" in failure("")
    assert "1 of the 2 benign requests are labelled 1" in failure('{"text": "a"}\n{"text": "b", "label": 1}')
    assert "benign.jsonl:2" in failure('{"text": "a"}\n{"txt": "b"}')
    assert "no response" in failure('{"text": "a"}', "--stage", "response")
    from probes.fit.rows import example as example_module

    monkeypatch.setattr(example_module, "drop_list", lambda: frozenset({text_digest("plan")}))
    assert "there are no requests in it that may be used" in failure('{"text": "plan"}')
