"""Steering directions: found in pairs, imported from others, with units that ordinary text gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from probes.card import Format
from probes.fit.steer import vector as module
from probes.fit.steer.pairs import PairError, VectorMethod, direction_of, quality_of, read_pairs
from probes.fit.steer.vector import (
    Subject,
    import_vector,
    read_gguf_direction,
    read_safetensors_direction,
    vector_from_pairs,
)
from probes.steering.artifact import Safety, SteerArtifact
from serving.commands.vector import VectorError, vector
from tests.support.tiny import D_MODEL, MARK, TinyModel, make_tiny_model

LAYER = 1


def planted(seed: int, pairs: int = 40, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(24)
    truth /= np.linalg.norm(truth)
    return truth, 3 * truth + noise * rng.standard_normal((pairs, 24))


@pytest.mark.parametrize("method", list(VectorMethod))
@pytest.mark.parametrize("seed", range(4))
def test_a_planted_direction_is_found_and_points_from_negative_to_positive(method: VectorMethod, seed: int) -> None:
    truth, differences = planted(seed)
    found = direction_of(differences, method)
    assert np.linalg.norm(found) == pytest.approx(1)
    assert found @ truth > 0.97
    assert direction_of(-differences, method) @ truth < -0.97


def test_pairs_that_cancel_each_other_have_no_direction() -> None:
    with pytest.raises(PairError, match="cancel each other"):
        direction_of(np.array([[1.0, 0.0], [-1.0, 0.0]]), VectorMethod.MEAN)


def test_quality_tells_agreement_from_chance() -> None:
    _, agreeing = planted(1, noise=0.1)
    noise = np.random.default_rng(2).standard_normal((40, 24))
    good, bad = (quality_of(differences, VectorMethod.MEAN) for differences in (agreeing, noise))
    assert good.agreement > 0.9
    assert good.reversed_share == 0
    # A pair is compared with the others: random ones agree no more than chance.
    assert abs(bad.agreement) < 0.2
    assert 0.2 < bad.reversed_share < 0.8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"pairs.jsonl:1: not of the form"),
        ('{"positive": "a", "negative": "b"}\n{"positive": "a"}', r"pairs.jsonl:2: not of the form"),
        ('{"positive": "a", "negative": "b", "c": 1}', r"pairs.jsonl:1: not of the form"),
        ('{"positive": "a", "negative": "b"}\n\n', r"1 pairs; at least 4 are needed"),
    ],
)
def test_pairs_that_cannot_be_read_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(PairError, match=said):
        read_pairs(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("vector") / "tiny-llama")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "user_cache_dir", lambda: tmp_path / "cache")
    yield


def subject(tiny: TinyModel, **changes: Any) -> Subject:
    fields = {"name": "calm", "description": "of a test", "more_is": Safety.NEUTRAL, "layer": LAYER}
    return Subject(tiny.path, "tiny", **(fields | changes))


def quiet(text: str) -> None:
    """No progress."""


def test_pairs_that_differ_in_a_planted_token_give_its_direction(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    words = ["river", "house", "winter", "paper", "engine", "garden", "letter", "window"]
    pairs = [
        {"positive": f"{word}{tiny.trigger_text}", "negative": f"{word}{tiny.trigger_text} {word}"} for word in words
    ]
    path.write_text("\n".join(map(json.dumps, pairs)))
    made = vector_from_pairs(
        subject(tiny),
        path,
        method=VectorMethod.MEAN,
        text_format=Format.RAW,
        read="last",
        out=tmp_path,
        progress=quiet,
    )
    loaded = SteerArtifact.load(made.path)
    found = loaded.steering_vector()
    assert np.linalg.norm(found.direction) == pytest.approx(1, abs=1e-6)
    # Positive texts end in the marked token, negative ones do not.
    assert found.direction[0] > 0
    assert loaded.card.training["method"] == "mean"
    assert loaded.card.evaluation["pairs"]["pairs"] == len(words)
    assert loaded.card.corpus_rows > 500


def test_units_are_those_of_ordinary_rows_behind_the_sink(tiny: TinyModel, tmp_path: Path) -> None:
    direction = np.zeros(D_MODEL)
    direction[0] = 5.0
    made = import_vector(subject(tiny), direction, source={"by": "hand"}, out=tmp_path, progress=quiet)
    found = made.steering_vector()
    assert found.direction[0] == 1
    assert made.card.training == {"by": "hand", "length": 5.0}
    # The marked token does not occur in ordinary text: nothing stands along its direction.
    assert (found.mean, found.ceiling) == (0.0, 0.0)
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(torch.randint(1000, 40000, (1, 200)), output_hidden_states=True).hidden_states[LAYER]
    # Before the last layer rather than behind it, of other text: the same size, not the same number.
    assert 0.3 < float(hidden.norm(dim=-1).median()) / found.median_norm < 3
    assert found.median_norm != MARK


@pytest.mark.parametrize(
    ("direction", "said"),
    [(np.ones(5), r"has the shape \(5,\); tiny has 128 dimensions"), (np.zeros(D_MODEL), "length is 0.0")],
)
def test_a_direction_that_does_not_fit_is_refused(
    tiny: TinyModel, tmp_path: Path, direction: np.ndarray, said: str
) -> None:
    with pytest.raises(PairError, match=said):
        import_vector(subject(tiny), direction, source={}, out=tmp_path, progress=quiet)


def test_control_vectors_in_gguf_are_read_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "happy.gguf"
    writer = GGUFWriter(str(path), "controlvector")
    directions = {layer: np.random.default_rng(layer).standard_normal(16).astype(np.float32) for layer in (1, 2)}
    for layer, values in directions.items():
        writer.add_tensor(f"direction.{layer}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(read_gguf_direction(path, 2), directions[2])
    with pytest.raises(PairError, match=r"has no 'direction.3'. Did you mean 'direction"):
        read_gguf_direction(path, 3)
    path.write_bytes(b"GGUF?")
    with pytest.raises(PairError, match="cannot be read as GGUF"):
        read_gguf_direction(path, 2)


def test_tensors_are_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"calm": np.arange(4, dtype=np.float32), "loud": np.ones((1, 4), dtype=np.float16)}, str(path))
    assert read_safetensors_direction(path, "calm").tolist() == [0, 1, 2, 3]
    assert read_safetensors_direction(path, "loud").shape == (4,)
    with pytest.raises(PairError, match=r"has no tensor 'clam'. Did you mean 'calm'"):
        read_safetensors_direction(path, "clam")
    with pytest.raises(PairError, match=r"holds 2 tensors. Say which one with --tensor"):
        read_safetensors_direction(path, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"more_is": "save"}, r"--more-is is 'save'. Did you mean 'safer'"),
        ({"method": "median"}, r"--method is 'median'"),
        ({"text_format": "chats"}, r"--format is 'chats'. Did you mean 'chat'"),
        ({"source": Path("a.bin")}, r"a.bin: what a direction is made of ends in"),
    ],
)
def test_the_command_says_what_is_allowed(tiny: TinyModel, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {
        "source": Path("a.jsonl"),
        "model": str(tiny.path),
        "layer": LAYER,
        "name": "calm",
        "more_is": "neutral",
        "description": "",
        "method": "mean",
        "text_format": "chat",
        "read": "last",
        "tensor": None,
        "out": tmp_path,
    }
    settings |= changes
    with pytest.raises(VectorError, match=said):
        vector(settings.pop("source"), **settings)
