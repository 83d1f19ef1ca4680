"""A vector made of latents is made of those that were planted, and of no dense ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from probes.artifact import ArtifactError
from probes.card import Format
from probes.fit.steer.pairs import PairError
from probes.fit.steer.vector import Subject
from probes.sae.feature_vector import Filters, feature_direction, vector_from_features
from probes.sae.file import SaeFile
from probes.sae.sae import Activation, Sae
from probes.steering.artifact import Safety, SteerArtifact
from probes.taps import Site, Tap
from tests.support.planted_sae import LAYER, PLANTED, planted_sae, sentences
from tests.support.words import make_word_model


@pytest.fixture(scope="module")
def sae(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SaeFile:
    return planted_sae(model_dir, tmp_path_factory.mktemp("sae") / "planted.safetensors")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Positive: the word is 'money'; negative: 'bread' in its place. 'party' stands in both."""
    path = tmp_path / "pairs.jsonl"
    texts = [text.replace("money", "bread") for text in sentences(12, 7)]
    lines = [{"positive": f"{text} party money", "negative": f"{text} party bread"} for text in texts]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def subject(model_dir: Path) -> Subject:
    return Subject(model_dir, "words", LAYER, "rich", "for a test", Safety.NEUTRAL)


def random_sae(tap: Tap | None = None) -> Sae:
    generator = np.random.default_rng(0)
    encoder, decoder = generator.normal(size=(10, 6)), generator.normal(size=(10, 6))
    return Sae.folded(
        tap=tap or Tap(0),
        activation=Activation.RELU,
        encoder=encoder,
        encoder_bias=np.zeros(10),
        decoder=decoder,
        decoder_bias=np.zeros(6),
    )


def test_the_vector_is_the_planted_latents_decoder_row(
    sae: SaeFile, model_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    made = vector_from_features(
        sae,
        subject(model_dir),
        pairs,
        filters=Filters(max_density=0.5, positive=1),
        text_format=Format.RAW,
        out=tmp_path,
        progress=lambda _: None,
    )
    money = PLANTED.index("money")
    again = SteerArtifact.load(made.path)
    row = sae.sae().decoder[money]
    np.testing.assert_allclose(again.tensors["direction"], row / np.linalg.norm(row), atol=1e-5)
    assert again.card.training["latents"] == [money]
    assert again.card.evaluation["pairs"]["reversed_share"] == 0.0
    again.steering_vector()


def test_a_difference_is_filtered_by_density_rank_and_sign() -> None:
    sae = random_sae()
    difference = np.array([5.0, 3.0, 2.0, 1.0, 0.0, -1.0, -4.0, 0.0, 0.0, 0.5])
    density = np.array([0.9, 0.001, 0.01, 0.002, 0.5, 0.001, 0.001, 0.0, 0.0, 0.0])
    found = feature_direction(sae, difference, density, Filters(max_density=0.01, positive=2, negative=1))
    assert found.latents == (6, 1, 2)
    assert found.weights == (-4.0, 3.0, 2.0)
    assert found.dense == 1
    expected = difference[[6, 1, 2]] @ sae.decoder[[6, 1, 2]].astype(np.float64)
    np.testing.assert_allclose(found.direction, expected / np.linalg.norm(expected), atol=1e-12)
    few = feature_direction(sae, difference, density, Filters(max_density=0.01, positive=9, negative=0))
    assert few.latents == (1, 2, 3, 9)


def test_nothing_left_is_told_with_what_to_do() -> None:
    with pytest.raises(PairError, match="--max-density"):
        feature_direction(random_sae(), np.ones(10), np.ones(10), Filters())


def test_a_sae_of_another_place_or_model_is_refused(sae: SaeFile, model_dir: Path, pairs: Path, tmp_path: Path) -> None:
    elsewhere = SaeFile(
        path=sae.path, card=sae.card.model_copy(update={"tap": str(Tap(LAYER, Site.MLP_OUT))}), tensors=sae.tensors
    )
    other = make_word_model(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    for file, folder, error, match in (
        (elsewhere, model_dir, PairError, "residual stream"),
        (sae, other, ArtifactError, "tokenizer_digest"),
    ):
        with pytest.raises(error, match=match):
            vector_from_features(
                file,
                subject(folder),
                pairs,
                filters=Filters(),
                text_format=Format.RAW,
                out=tmp_path,
                progress=lambda _: None,
            )
