"""What an autoencoder is trained on: texts, tokens, rows without sinks, each on one side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from probes.card import Format, ModelRef
from probes.fit.reading.activation_manifest import TokenPositions
from probes.fit.reading.activation_store import StoreError
from probes.fit.reading.activation_writer import PreparedRequest
from probes.fit.reading.rendered import Rendered
from probes.fit.sources import evals_code, evals_exams, evals_texts, parse_source
from probes.modelref import read_model_ref
from probes.sae.train.corpus import CorpusError, CorpusSettings, build_corpus
from probes.sae.train.material import MaterialError, collected_material
from probes.sae.train.reading import ReadingError, RowReader, leading_sinks
from probes.taps import Tap
from tests.support.made_wheels import context_with
from tests.support.sae_settings import TAP, context, write_config
from tests.support.words import activations_by_hooks
from tests.unit import collected


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelRef:
    return read_model_ref(model_dir, model_id="words", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(model_dir))


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
