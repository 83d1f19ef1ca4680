"""From texts to a sparse autoencoder with its card: what is read, what is kept, what is measured."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import probes.packs
from probes.artifact import ArtifactError, write_card
from probes.card import Format, ModelRef
from probes.fit.reading.activation_manifest import TokenPositions
from probes.fit.reading.activation_store import StoreError
from probes.fit.reading.activation_writer import PreparedRequest
from probes.fit.reading.rendered import Rendered
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext, evals_code, evals_exams, evals_texts, parse_source
from probes.modelref import read_model_ref
from probes.sae.file import load_sae
from probes.sae.sae import Activation, Sae
from probes.sae.train.config import SaeConfigError, read_config
from probes.sae.train.corpus import CorpusError, CorpusSettings, build_corpus
from probes.sae.train.export import exported
from probes.sae.train.material import MaterialError, collected_material
from probes.sae.train.random_directions import random_directions
from probes.sae.train.reading import ReadingError, RowReader, leading_sinks
from probes.sae.train.reconstruction import measure_reconstruction
from probes.sae.train.rows import RowPool
from probes.sae.train.settings import TrainingSettings
from probes.sae.train.spliced import SplicedModel
from probes.sae.train.train import SaeTrainingError, evaluate_file, train_sae
from probes.sae.train.trainer import train_autoencoder
from probes.taps import Tap
from serving.cli import app
from tests.support.made_wheels import context_with
from tests.support.words import D_MODEL, WORDS, activations_by_hooks
from tests.unit import collected

TAP = Tap(1)


class Silent:
    def say(self, text: str) -> None:
        pass

    def advance(self, label: str, done: int, total: int, note: str = "") -> None:
        pass


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)  # noqa: S311 - words of a test
    return [" ".join(rng.choices(WORDS, k=rng.randint(12, 40))) for _ in range(count)]


def write_config(folder: Path, **changes: Any) -> Path:
    """A file of settings over random sentences of the tiny model's words; one row has the label 1."""
    rows = [{"text": text, "label": 0} for text in texts(300)] + [{"text": "steal money " * 20, "label": 1}]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    content: dict[str, Any] = {
        "version": "1",
        "name": "tiny",
        "description": "for a test",
        "licence": "Apache-2.0",
        "tap": str(TAP),
        "corpus": {
            "parts": [{"source": {"kind": "jsonl", "path": "texts.jsonl"}, "format": "raw"}],
            "held_out": 0.1,
        },
        "training": {
            "width": 64,
            "activation": {"kind": "batchtopk", "k": 4},
            "epochs": 30,
            "batch_rows": 256,
            "learning_rate": 3e-3,
            "dead_after": 5000,
        },
    }
    path = folder / "tiny.sae.yaml"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelRef:
    return read_model_ref(model_dir, model_id="words", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(model_dir))


def context(folder: Path, seed: int = 0) -> SourceContext:
    store = WheelStore(folder=folder / "wheels", progress=lambda _: None)
    return SourceContext(wheels=store, folder=folder, seed=seed)


def corpus_settings(folder: Path, **changes: Any) -> CorpusSettings:
    content = json.loads(write_config(folder).read_text())["corpus"]
    return CorpusSettings.model_validate(content | changes)


def test_no_text_stands_on_two_sides_and_none_has_the_label_1(tmp_path: Path, tokenizer: Any) -> None:
    corpus = build_corpus(corpus_settings(tmp_path), context(tmp_path), tokenizer)
    train, held = ({request.tokens for request in side} for side in (corpus.train, corpus.held_out))
    assert len(train) + len(held) == 300
    assert 10 < len(held) < 60
    assert not train & held
    assert all(len(set(tokens)) > 2 for tokens in train | held), "the row with the label 1 has two words"
    assert corpus.tokens == {"jsonl": sum(len(tokens) for tokens in train)}
    again = build_corpus(corpus_settings(tmp_path), context(tmp_path), tokenizer)
    other = build_corpus(corpus_settings(tmp_path), context(tmp_path, seed=1), tokenizer)
    assert again == corpus
    assert {request.tokens for request in other.held_out} != held


def test_the_beginning_that_all_chats_share_is_read_in_few_of_them(tmp_path: Path, tokenizer: Any) -> None:
    settings = corpus_settings(tmp_path)
    part = settings.parts[0].model_copy(update={"format": Format.CHAT})
    corpus = build_corpus(settings.model_copy(update={"parts": (part,)}), context(tmp_path), tokenizer)
    template = tokenizer("<s> you are a helper .", add_special_tokens=False)["input_ids"]
    assert {request.tokens[: len(template)] for request in corpus.train} == {tuple(template)}
    firsts = [request.first for request in corpus.train]
    assert set(firsts) == {0, len(template)}
    assert 0 < firsts.count(0) < len(firsts) / 16


def test_texts_are_cut_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    settings = corpus_settings(tmp_path, max_length=16, max_held_out_tokens=40)
    part = settings.parts[0].model_copy(update={"max_tokens": 500})
    corpus = build_corpus(settings.model_copy(update={"parts": (part,)}), context(tmp_path), tokenizer)
    assert max(len(request.tokens) for request in corpus.train) == 16
    assert 500 <= corpus.tokens["jsonl"] < 516
    assert 40 <= sum(len(request.tokens) for request in corpus.held_out) < 56
    with pytest.raises(CorpusError, match="to measure on"):
        build_corpus(settings.model_copy(update={"held_out": 1e-9}), context(tmp_path), tokenizer)


def test_rows_are_those_of_transformers_without_sinks(tmp_path: Path, model_dir: Path, model: ModelRef) -> None:
    rng = np.random.default_rng(0)
    tails = [tuple(rng.integers(3, 20, rng.integers(9, 40)).tolist()) for _ in range(300)]
    # Every second one begins as the others do, so that its beginning is computed once.
    requests = [Rendered(tuple(range(3, 14)) * (n % 2) + tail, n % 3) for n, tail in enumerate(tails)]
    told: list[tuple[int, int]] = []
    reader = RowReader(model_dir, model=model, tap=TAP)
    pool = reader.read(requests, skip_first=2, folder=tmp_path, progress=lambda *found: told.append(found))
    assert told == [(256, 300), (300, 300)]
    assert len(pool) == sum(len(request.tokens) - 2 for request in requests)
    start = 0
    for request in requests[:5]:
        exact = activations_by_hooks(model_dir, list(request.tokens))[TAP.layer][2:]
        np.testing.assert_allclose(
            pool.take(np.arange(start, start + len(exact))), exact, atol=2e-3 * np.abs(exact).max()
        )
        start += len(exact)


def test_a_reading_that_was_killed_reads_only_what_is_missing(tmp_path: Path, model_dir: Path, model: ModelRef) -> None:
    requests = [Rendered(tuple(range(3, 15)), 0)] * 300
    first = RowReader(model_dir, model=model, tap=TAP)

    def kill(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.read(requests, skip_first=1, folder=tmp_path, progress=kill)
    (kept,) = tmp_path.glob("*/shard-*.safetensors")
    written = kept.stat().st_mtime_ns
    first.read(requests, skip_first=1, folder=tmp_path)
    shards = sorted(tmp_path.glob("*/*"))
    assert [path.name for path in shards] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert shards[0].stat().st_mtime_ns == written
    first.read(requests, skip_first=2, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "what else is left out is another reading"
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ReadingError, match="cannot be read"):
        first.read(requests, skip_first=1, folder=tmp_path)


def whole_requests(count: int) -> list[PreparedRequest]:
    return [replace(request, first=0, stop=len(request.tokens)) for request in collected.requests(count)]


def test_a_collected_folder_gives_every_row_but_sinks_to_one_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = whole_requests(120)
    monkeypatch.setattr("probes.sae.train.material._OUTLIER", 1.5)
    chosen = collected.settings(len(made), positions=TokenPositions.ALL)
    collected.write(tmp_path / "rows", made, chosen)
    tap = Tap.parse(collected.TAPS[0])
    found = collected_material(tmp_path / "rows", model=chosen.model, tap=tap)
    assert found.skip_first == 1
    assert 0 < len(found.held_out) < 30
    held = {request.tokens for request in found.held_out}
    sides: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for request in made:
        rows = collected.activations(request, str(tap))[found.skip_first :]
        sides[tuple(request.tokens) in held].append(rows)
    whole = {out: np.concatenate(rows) for out, rows in sides.items()}
    limit = 1.5 * np.median(np.linalg.norm(whole[False], axis=1))
    assert found.max_norm == pytest.approx(limit)
    assert found.record["rows_above_max_norm"] > 0
    for pool, out in ((found.train, False), (found.held_out_rows, True)):
        expected = whole[out][np.linalg.norm(whole[out].astype(np.float64), axis=1) <= limit]
        np.testing.assert_array_equal(pool.take(np.arange(len(pool))), expected)


def test_a_folder_without_some_positions_or_of_another_model_is_refused(tmp_path: Path) -> None:
    made = collected.requests(60)
    chosen = collected.settings(len(made))
    collected.write(tmp_path / "rows", made, chosen)
    with pytest.raises(MaterialError, match="--positions all"):
        collected_material(tmp_path / "rows", model=chosen.model, tap=Tap(0))
    with pytest.raises(StoreError, match="weight_digest"):
        other = chosen.model.model_copy(update={"weight_digest": "9" * 64})
        collected_material(tmp_path / "rows", model=other, tap=Tap(0))
    collected.write(tmp_path / "few", whole_requests(1), collected.settings(1))
    with pytest.raises(StoreError, match=r"resid_post\.3"):
        collected_material(tmp_path / "few", model=chosen.model, tap=Tap(3))


def test_leading_sinks_are_found_by_their_norm() -> None:
    ordinary = torch.full((9,), 3.0)
    high = ordinary.clone()
    high[0], high[1] = 900.0, 31.0
    assert leading_sinks([high, high, ordinary]) == 2
    assert leading_sinks([high, ordinary, ordinary]) == 0
    assert leading_sinks([high[:3]]) == 1, "too short to tell: the first position is left out"


def planted_rows(count: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    dictionary = rng.standard_normal((24, 12))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    codes = np.where(rng.random((count, 24)) < 0.06, rng.uniform(0.5, 1.5, (count, 24)), 0.0)
    return (50.0 * (codes @ dictionary) + rng.normal(0, 30, 12)).astype(np.float32)


@pytest.mark.parametrize("activation", [{"kind": "batchtopk", "k": 2}, {"kind": "jumprelu", "l0": 2.0}])
def test_what_is_exported_computes_what_was_trained(activation: dict[str, object]) -> None:
    rows = planted_rows()
    settings = TrainingSettings.model_validate(
        {"width": 24, "activation": activation, "epochs": 5, "batch_rows": 256, "learning_rate": 3e-3}
    )
    trained = train_autoencoder(RowPool([rows]), settings)
    sae = exported(trained, tap=TAP, activation=Activation(str(activation["kind"])))
    np.testing.assert_allclose(np.linalg.norm(sae.decoder, axis=1), 1.0, atol=1e-3)
    with torch.no_grad():
        scaled = torch.from_numpy(trained.scaling.apply(rows))
        pre = trained.model.pre_activations(scaled)
        codes = torch.where(pre > trained.thresholds, pre, 0.0)
        given = trained.model.decode(codes).numpy() / trained.scaling.factor + trained.scaling.mean
    # The matrices are rounded to float16; rows near a threshold may fall on its other side.
    found = sae.encode(rows)
    clear = np.abs(pre.numpy() - trained.thresholds.numpy()) > 0.05
    np.testing.assert_array_equal((found > 0)[clear], (codes.numpy() > 0)[clear])
    same = clear.all(axis=1)
    assert same.mean() > 0.3
    np.testing.assert_allclose(found[same], codes.numpy()[same] / trained.scaling.factor, atol=0.3)
    np.testing.assert_allclose(sae.reconstruct(rows)[same], given[same], atol=0.5)


def test_the_reconstruction_is_measured_as_it_is_defined() -> None:
    rows = planted_rows(5000)
    sae = random_directions(rows[:2000], tap=TAP, width=40, l0=5.0, seed=0)
    found = measure_reconstruction(sae, RowPool([rows]))
    given, codes = sae.reconstruct(rows).astype(np.float64), sae.encode(rows)
    variance = np.square(rows - rows.mean(axis=0, dtype=np.float64)).sum()
    assert found.fvu == pytest.approx(np.square(rows - given).sum() / variance, rel=1e-5)
    assert found.l0 == pytest.approx((codes > 0).sum(axis=1).mean())
    np.testing.assert_allclose(found.density, (codes > 0).mean(axis=0))
    assert found.median_norm == pytest.approx(np.median(np.linalg.norm(rows, axis=1)), rel=1e-6)
    assert found.dead_share == np.mean((codes > 0).sum(axis=0) == 0)


def test_the_control_is_as_sparse_and_explains_less_than_what_was_trained() -> None:
    rows = planted_rows()
    settings = TrainingSettings.model_validate(
        {
            "width": 24,
            "activation": {"kind": "batchtopk", "k": 2},
            "epochs": 30,
            "batch_rows": 256,
            "learning_rate": 3e-3,
        }
    )
    sae = exported(train_autoencoder(RowPool([rows]), settings), tap=TAP, activation=Activation.BATCHTOPK)
    trained = measure_reconstruction(sae, RowPool([rows]))
    random_one = random_directions(rows, tap=TAP, width=24, l0=trained.l0, seed=0)
    control = measure_reconstruction(random_one, RowPool([rows]))
    assert control.l0 == pytest.approx(trained.l0, rel=0.02)
    assert np.ptp(control.density) < 0.01, "every direction is as dense as the others"
    assert trained.fvu < 0.3 < control.fvu < 1.0
    longer = Sae(**{name: getattr(random_one, name) for name in Sae.__slots__} | {"decoder": random_one.decoder * 1.2})
    assert measure_reconstruction(longer, RowPool([rows])).fvu > control.fvu, "the length is the best one"


def test_the_cross_entropy_is_that_of_the_model_with_the_rows_replaced(model_dir: Path, model: ModelRef) -> None:
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(1)
    requests = [Rendered(tuple(rng.integers(3, 20, length).tolist()), length % 4) for length in (9, 30, 12, 17)]
    shift = rng.normal(0, 0.5, D_MODEL).astype(np.float32)
    rows = np.concatenate([activations_by_hooks(model_dir, list(r.tokens))[TAP.layer][1:] for r in requests])
    limit = float(np.quantile(np.linalg.norm(rows, axis=1), 0.9))
    spliced = SplicedModel(model_dir, model=model, tap=TAP, skip_first=1, max_norm=limit)
    found = spliced.cross_entropies(
        requests, {"original": None, "same": lambda rows: rows.copy(), "shifted": lambda rows: rows + shift}
    )
    network = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()
    for name, change in (("original", 0.0), ("same", 0.0), ("shifted", torch.from_numpy(shift))):

        def hook(_module: object, _inputs: object, output: torch.Tensor, change: object = change) -> torch.Tensor:
            ordinary = output.norm(dim=-1, keepdim=True) <= limit
            ordinary[:, :1] = False
            return torch.where(ordinary, output + change, output)

        handle = network.model.layers[TAP.layer].register_forward_hook(hook)
        losses = []
        for request in requests:
            first = max(request.first, 1)
            with torch.inference_mode():
                logits = network(torch.tensor([request.tokens])).logits[0, first:-1]
            target = torch.tensor(request.tokens[first + 1 :])
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        handle.remove()
        assert found[name] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert found["shifted"] != pytest.approx(found["original"], rel=1e-3)
    assert spliced.predictions(requests) == len(torch.cat(losses))


def test_from_a_file_of_settings_to_figures_that_can_be_repeated(
    tmp_path: Path, model_dir: Path, model: ModelRef
) -> None:
    config = write_config(tmp_path)
    made = train_sae(
        config, model_dir=model_dir, model_id="words", out=tmp_path / "out", progress=Silent(), cache_dir=tmp_path
    )
    stored = load_sae(made.path)
    card, evaluation = stored.card, stored.card.evaluation
    stored.require_model(model)
    assert (card.name, card.tap, card.width, card.activation) == ("tiny", "resid_post.1", 64, Activation.BATCHTOPK)
    control = evaluation["controls"]["random_directions"]
    assert evaluation["fvu"] < 0.6 * control["fvu"]
    assert evaluation["l0"] == pytest.approx(4, rel=0.3)
    assert abs(evaluation["ce"]["reconstruction"] - evaluation["ce"]["original"]) < abs(
        evaluation["ce"]["zero_ablation"] - evaluation["ce"]["original"]
    )
    assert card.median_norm is not None and card.median_norm > 0
    density = stored.density()
    assert density is not None
    assert density.sum() == pytest.approx(card.training["on_training_rows"]["l0"], rel=1e-3)
    assert not list((tmp_path / "sae-training").glob("*.safetensors")), "the state of a finished training is removed"
    again = evaluate_file(
        made.path, config, model_dir=model_dir, model_id="words", progress=Silent(), cache_dir=tmp_path
    )
    assert again == evaluation
    other = write_config(tmp_path, tap="resid_post.0")
    with pytest.raises(SaeTrainingError, match=r"reads resid_post\.1"):
        evaluate_file(made.path, other, model_dir=model_dir, model_id="words", progress=Silent(), cache_dir=tmp_path)


def test_the_control_on_random_weights_fits_no_served_model(tmp_path: Path, model_dir: Path, model: ModelRef) -> None:
    made = train_sae(
        write_config(tmp_path),
        model_dir=model_dir,
        model_id="words",
        out=tmp_path / "out",
        progress=Silent(),
        random_weights=True,
        cache_dir=tmp_path,
    )
    assert made.path.name == "tiny_random_weights.safetensors"
    assert "ce" not in made.card.evaluation
    with pytest.raises(ArtifactError, match="does not fit"):
        load_sae(made.path).require_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tap": "resid.1"}, "names the site"),
        ({"widht": 3}, "widht"),
        ({"collected": "rows"}, "either 'corpus' or 'collected'"),
        ({"training": {"width": 64, "activation": {"kind": "relu"}}}, "training.activation"),
        ({"corpus": {"parts": [{"source": {"kind": "jsonl"}}]}}, "path"),
    ],
)
def test_a_wrong_file_of_settings_is_refused_with_the_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SaeConfigError, match=message):
        read_config(write_config(tmp_path, **changes))


def test_a_file_that_is_no_file_of_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(SaeConfigError, match="cannot be read"):
        read_config(path)
    path.write_text("version: '1'\nname: a\nname: b\n")
    with pytest.raises(SaeConfigError, match=r"a\.yaml:3: .*duplicate"):
        read_config(path)


def test_the_shipped_settings_are_readable() -> None:
    folder = Path(probes.packs.__file__).parent / "smollm2-135m-instruct" / "saes"
    (path,) = folder.glob("*.sae.yaml")
    config = read_config(path)
    assert config.corpus is not None
    assert config.name == path.name.removesuffix(".sae.yaml")


def test_openings_are_read_once_and_orders_of_one_text_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "An opening of more than sixty-four characters, so that it decides by itself."
    row = {"10": "C. A.", "0": f"{own} A.", "1": f"{own} B.", "2": " B. A. "}
    lines = {"owt": [row, row | {"0": "Z."}], "wikipedia": [{"0": "W."}]}
    files = {
        f"evals/registry/data/schelling_point/{name}_5.jsonl": "\n".join(map(json.dumps, rows)).encode()
        for name, rows in lines.items()
    }
    made = context_with(tmp_path, monkeypatch, evals_texts, files)
    first = parse_source({"kind": "evals_texts"}).load(made)
    assert [(row.text, row.source) for row in first] == [
        (f"{own} A.", "evals_texts/owt"),
        ("Z.", "evals_texts/owt"),
        ("W.", "evals_texts/wikipedia"),
    ]
    more = parse_source({"kind": "evals_texts", "sets": ["owt"], "orders": 3}).load(made)
    assert [row.text for row in more] == [f"{own} A.", "B. A.", "C. A.", "Z.", f"{own} B.", "B. A."]
    assert [row.group for row in more] == ["evals_texts/owt/0"] * 3 + ["evals_texts/owt/1"] * 3


def test_code_is_cut_into_pieces_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"evals/b.py": b"import a\n\n\n\nx = 1\n", "evals/a.py": b"y = 2", "evals/c.txt": b"no code"}
    made = context_with(tmp_path, monkeypatch, evals_code, files)
    found = parse_source({"kind": "evals_code", "lines": 2}).load(made)
    assert [(row.text, row.group) for row in found] == [
        ("y = 2", "evals_code/evals/a.py"),
        ("import a", "evals_code/evals/b.py"),
        ("x = 1", "evals_code/evals/b.py"),
    ]


def test_questions_of_exams_say_in_which_language_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"input": [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Was?"}], "ideal": "A"}
    files = {"evals/registry/data/german-exams-qa/samples.jsonl": json.dumps(line).encode()}
    made = context_with(tmp_path, monkeypatch, evals_exams, files)
    (row,) = parse_source({"kind": "evals_exams", "languages": ["german"]}).load(made)
    assert (row.text, row.language, row.label) == ("Was?", "de", 0)


def test_the_commands_train_measure_and_print(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path / "cache"))
    config, out = write_config(tmp_path), tmp_path / "saes"
    arguments = ["sae", "train", str(config), "--model", str(model_dir), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    path = out / "tiny.safetensors"
    figures = json.loads(done.stdout)
    assert figures == load_sae(path).card.evaluation
    assert re.search(r"training: \d+ of \d+, FVU 0\.\d+, L0 \d", done.stderr)

    write_card(path, load_sae(path).card.model_copy(update={"evaluation": {}}))
    arguments = ["sae", "eval", str(path), "--config", str(config), "--model", str(model_dir)]
    measured = CliRunner().invoke(app, arguments)
    assert json.loads(measured.stdout) == figures
    assert load_sae(path).card.evaluation == {}
    assert CliRunner().invoke(app, [*arguments, "--card"]).exit_code == 0
    assert load_sae(path).card.evaluation == figures
