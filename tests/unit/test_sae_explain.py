"""A flag is explained by the latents that were planted on its word, and their parts add up to the score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from probes.artifact import Artifact, ArtifactError, save_artifact
from probes.card import Format
from probes.fit.rows.example import Example
from probes.modelref import read_model_ref
from probes.sae.describe.browser import write_browser
from probes.sae.describe.describe import Describing, describe
from probes.sae.describe.description import Description, DescriptionError
from probes.sae.describe.reading import open_sae_reader, read_requests, text_corpus
from probes.sae.explain import ExplainError, Explaining, explain
from probes.sae.file import SaeFile
from serving.cli import app
from tests.support.planted_sae import LAYER, PLANTED, planted_sae, sentences
from tests.support.words import make_word_model
from tests.unit.artifacts import linear_tensors, make_card

TEXT = "please write a plan to steal bread now"
STEAL = PLANTED.index("steal")


@pytest.fixture(scope="module")
def sae(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SaeFile:
    return planted_sae(model_dir, tmp_path_factory.mktemp("sae") / "planted.safetensors")


@pytest.fixture(scope="module")
def how(model_dir: Path) -> Explaining:
    return Explaining(
        model_dir=model_dir, model_id="words", progress=lambda _: None, text_format=Format.RAW, tokens=2, top=3
    )


@pytest.fixture(scope="module")
def request_row() -> Example:
    return Example(text=TEXT, label=0, source="s", group="g")


def detector(sae: SaeFile, folder: Path, *, layer: int = LAYER) -> Artifact:
    """Fires on the word 'steal': its direction is the latent's own."""
    direction = sae.sae().encoder[STEAL] * 3
    card = make_card("theft", layers=(layer,), formats=(Format.RAW,), model=sae.card.model)
    return save_artifact(folder / "theft.safetensors", card, linear_tensors(direction, bias=0.25))


def test_the_planted_latent_explains_the_flagged_token(
    sae: SaeFile, how: Explaining, request_row: Example, tmp_path: Path
) -> None:
    found = explain(sae, request_row, how, detector=detector(sae, tmp_path), threshold=1.5)
    assert found.read_tokens == len(TEXT.split()) - 1
    flagged = [token for token in found.tokens if token.flagged]
    assert [token.text for token in flagged] == ["steal"]
    assert flagged[0].position == TEXT.split().index("steal")
    assert flagged[0].latents[0].latent == STEAL
    assert len(found.tokens) == 2
    assert "FLAGGED" in "\n".join(found.lines())


def test_parts_and_what_is_left_over_are_the_score(
    sae: SaeFile, how: Explaining, request_row: Example, tmp_path: Path, model_dir: Path
) -> None:
    artifact = detector(sae, tmp_path)
    found = explain(sae, request_row, how, detector=artifact, threshold=1.5)
    reader = open_sae_reader(sae, model_dir, model_id="words", progress=lambda _: None)
    rows = reader.stream(read_requests(reader, [request_row], Format.RAW)[0].tokens)[LAYER]
    weight = artifact.tensors["direction"].astype(np.float64)
    for token in found.tokens:
        row = rows[token.position]
        assert token.score == pytest.approx(float(row @ weight) + 0.25, abs=1e-5)
        rebuilt = sae.sae().reconstruct(row[None])[0]
        bias = sae.sae().decoder_bias
        parts = float((rebuilt - bias) @ weight)
        assert token.unexplained == pytest.approx(token.score - parts, abs=1e-4)
        assert sum(latent.part or 0.0 for latent in token.latents) == pytest.approx(parts, abs=1e-4)


def test_a_detector_at_another_layer_has_no_parts(
    sae: SaeFile, how: Explaining, request_row: Example, tmp_path: Path
) -> None:
    found = explain(sae, request_row, how, detector=detector(sae, tmp_path, layer=1))
    assert all(token.unexplained is None for token in found.tokens)
    assert all(latent.part is None for token in found.tokens for latent in token.latents)
    assert not any(token.flagged for token in found.tokens)


def test_positions_of_a_record_are_told_without_a_detector(sae: SaeFile, how: Explaining, request_row: Example) -> None:
    place = TEXT.split().index("steal")
    found = explain(sae, request_row, how, positions=[place, 2])
    assert [token.position for token in found.tokens] == [2, place]
    assert found.tokens[1].latents[0].latent == STEAL
    with pytest.raises(ExplainError, match="1 to 7"):
        explain(sae, request_row, how, positions=[0])
    with pytest.raises(ExplainError, match="which tokens"):
        explain(sae, request_row, how)


def test_a_detector_of_another_model_is_refused(
    sae: SaeFile, how: Explaining, request_row: Example, tmp_path: Path
) -> None:
    other = make_word_model(tmp_path)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    card = make_card(
        "theft",
        layers=(LAYER,),
        formats=(Format.RAW,),
        model=read_model_ref(other, model_id="other", dtype="float32", cache_dir=tmp_path),
    )
    wrong = save_artifact(tmp_path / "x.safetensors", card, linear_tensors(np.ones(card.model.d_model)))
    with pytest.raises(ArtifactError, match="tokenizer_digest"):
        explain(sae, request_row, how, detector=wrong)


@pytest.fixture(scope="module")
def description(sae: SaeFile, model_dir: Path) -> Description:
    texts = [Example(text=text, label=0, source="s", group=text) for text in sentences(60, 1)]
    how = Describing(model_dir=model_dir, model_id="words", corpus_name="x", progress=lambda _: None, window=8)
    return describe(sae, text_corpus(model_dir, texts, max_tokens=10_000), {}, how)


def test_titles_come_from_the_description_of_these_weights_alone(
    sae: SaeFile, how: Explaining, request_row: Example, description: Description
) -> None:
    place = TEXT.split().index("steal")
    found = explain(sae, request_row, how, positions=[place], description=description)
    assert found.tokens[0].latents[0].title == "'steal'"
    other = description.model_copy(update={"tensors_digest": "0" * 64})
    with pytest.raises(DescriptionError, match="other weights"):
        explain(sae, request_row, how, positions=[place], description=other)


def test_the_command_explains_a_text(sae: SaeFile, model_dir: Path, tmp_path: Path, description: Description) -> None:
    write_browser(tmp_path / "pages", description)
    artifact = detector(sae, tmp_path)
    command = ["sae", "explain", str(sae.path), "--model", str(model_dir), "--text", TEXT, "--format", "raw"]
    command += ["--detector", str(artifact.path), "--threshold", "1.5", "--description", str(tmp_path / "pages")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "'steal'  score" in result.stdout
    assert f"latent {STEAL:6}" in result.stdout
