"""An artifact comes back as it was written, or not at all: damage, edits and other models are refused by name."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from safetensors.numpy import save

from probes.aggregate.ema import Ema
from probes.artifact import Artifact, ArtifactError, card_path_of, save_artifact, sha256_file
from probes.card import Stage
from probes.errors import did_you_mean
from probes.packs import PackError, load_pack, pack_names
from probes.taps import Site, Tap, TapError
from tests.unit.artifacts import calibration, make_card, model_ref, saved_artifact


def edit_card(artifact: Artifact, **changes: Any) -> None:
    path = card_path_of(artifact.path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(artifact: Artifact, data: bytes) -> None:
    """Other bytes, with a card that vouches for them."""
    artifact.path.write_bytes(data)
    edit_card(artifact, tensors_digest=sha256_file(artifact.path))


@settings(max_examples=25, deadline=None)
@given(
    direction=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.float16]), 8, elements=st.floats(-100, 100, width=16)
    ),
    threshold=st.floats(-1e6, 1e6),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, direction: npt.NDArray[Any], threshold: float) -> None:
    path = tmp_path_factory.mktemp("artifact") / "deep" / "harm.safetensors"
    card = make_card(calibrations=[calibration(Stage.STREAM, aggregate=Ema(alpha=0.3), threshold=threshold)])
    written = save_artifact(path, card, {"direction": direction, "bias": np.array([threshold])})
    read = Artifact.load(path)
    assert read.card == written.card == card.model_copy(update={"tensors_digest": sha256_file(path)})
    assert read.tensors["direction"].dtype == direction.dtype
    assert np.array_equal(read.tensors["direction"], direction)
    assert read.vector("bias", 1)[0] == threshold


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    saved_artifact(tmp_path, make_card())
    saved_artifact(tmp_path, make_card())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["harm.card.json", "harm.safetensors"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in tmp_path.iterdir())


def test_a_view_is_saved_as_it_is_seen(tmp_path: Path) -> None:
    tensor = np.arange(16, dtype=np.float32)[::2]
    save_artifact(tmp_path / "harm.safetensors", make_card(), {"direction": tensor})
    assert np.array_equal(Artifact.load(tmp_path / "harm.safetensors").vector("direction", 8), tensor)


@pytest.mark.parametrize("keep", [0, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    artifact = saved_artifact(tmp_path, make_card())
    artifact.path.write_bytes(artifact.path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"harm\.safetensors: SHA-256 is .* truncated"):
        Artifact.load(artifact.path)


@pytest.mark.parametrize("keep", [0, 8, 100, -1])
def test_a_truncated_file_with_its_own_digest_is_refused(tmp_path: Path, keep: int) -> None:
    artifact = saved_artifact(tmp_path, make_card())
    rewrite(artifact, artifact.path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        Artifact.load(artifact.path)


def test_a_tensor_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    artifact = saved_artifact(tmp_path, make_card())
    data = save({"direction": np.zeros(8, dtype=np.float16)}).replace(b'"F16"', b'"BF16"')
    header = int.from_bytes(data[:8], "little")
    rewrite(artifact, (header + 1).to_bytes(8, "little") + data[8:])
    with pytest.raises(ArtifactError, match=r"harm\.safetensors: holds a tensor of type BF16"):
        Artifact.load(artifact.path)


def test_one_changed_bit_is_refused(tmp_path: Path) -> None:
    artifact = saved_artifact(tmp_path, make_card())
    data = bytearray(artifact.path.read_bytes())
    data[-1] ^= 1
    artifact.path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="not the one that the card describes"):
        Artifact.load(artifact.path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format_version": 2}, "format_version"),
        ({"name": "Harm!"}, "name"),
        ({"taps": []}, "taps"),
        ({"skip_first": -1}, "skip_first"),
        ({"tensors_digest": "abc"}, "tensors_digest"),
        ({"formats": ["smoke_signals"]}, "formats"),
    ],
)
def test_an_edited_card_is_refused_with_the_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    artifact = saved_artifact(tmp_path, make_card())
    edit_card(artifact, **changes)
    with pytest.raises(ArtifactError, match=rf"harm\.card\.json: field '{field}"):
        Artifact.load(artifact.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", float("nan")),
        ("threshold", float("inf")),
        ("top_scores", [1.0, float("nan")]),
        ("top_scores", [1.0, 2.0]),
        ("top_scores", []),
        ("aggregate", {"kind": "ema", "alpha": 7}),
        ("aggregate", {"kind": "emma"}),
    ],
)
def test_a_calibration_that_could_not_fire_rightly_is_refused(tmp_path: Path, field: str, value: object) -> None:
    """NaN never fires, and order statistics out of order would give a threshold that promises nothing."""
    artifact = saved_artifact(tmp_path, make_card(calibrations=[calibration()]))
    (entry,) = json.loads(card_path_of(artifact.path).read_text())["calibrations"]
    edit_card(artifact, calibrations=[entry | {field: value}])
    with pytest.raises(ArtifactError, match=rf"calibrations\.0\.{field}"):
        Artifact.load(artifact.path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    artifact = saved_artifact(tmp_path, make_card())
    with pytest.raises(ArtifactError, match=r"other\.safetensors: cannot be read \(No such file"):
        Artifact.load(tmp_path / "other.safetensors")
    card_path_of(artifact.path).unlink()
    with pytest.raises(ArtifactError, match=r"harm\.card\.json: cannot be read"):
        Artifact.load(artifact.path)
    card_path_of(artifact.path).write_bytes(b"{")
    with pytest.raises(ArtifactError, match=r"card\.json"):
        Artifact.load(artifact.path)
    with pytest.raises(ArtifactError, match=r"ends in \.safetensors"):
        save_artifact(tmp_path / "harm.pt", make_card(), {})


def test_vectors_are_checked(tmp_path: Path) -> None:
    tensors = {"direction": np.array([1.0, np.nan]), "bias": np.zeros((1, 1))}
    artifact = save_artifact(tmp_path / "harm.safetensors", make_card(), tensors)
    with pytest.raises(ArtifactError, match="'direction' holds NaN"):
        artifact.vector("direction", 2)
    with pytest.raises(ArtifactError, match=r"shape \(1, 1\); it must be \(1,\)"):
        artifact.vector("bias", 1)
    with pytest.raises(ArtifactError, match=r"'scale' is missing; there are \['bias', 'direction'\]"):
        artifact.vector("scale", 1)


def test_require_model_names_each_differing_field(tmp_path: Path) -> None:
    artifact = saved_artifact(tmp_path, make_card())
    artifact.require_model(model_ref(id="another name is no other model"))
    others: dict[str, Any] = {
        "weight_digest": "d" * 64,
        "tokenizer_digest": "d" * 64,
        "chat_template_digest": "d" * 64,
        "d_model": 16,
        "num_layers": 2,
        "dtype": "bfloat16",
    }
    for field, value in others.items():
        with pytest.raises(ArtifactError, match=rf"Differing: {field} \(card: ") as caught:
            artifact.require_model(model_ref(**{field: value}))
        assert not [other for other in others if other != field and f"{other} (card" in str(caught.value)]
    with pytest.raises(ArtifactError) as caught:
        artifact.require_model(model_ref(**others))
    assert all(f"{field} (card" in str(caught.value) for field in others)


def test_every_field_of_a_model_but_its_name_is_compared(tmp_path: Path) -> None:
    artifact = saved_artifact(tmp_path, make_card())
    for field in set(type(artifact.card.model).model_fields) - {"id"}:
        served = artifact.card.model.model_copy(update={field: "other"})
        with pytest.raises(ArtifactError, match=field):
            artifact.require_model(served)


def test_packs_load_and_are_bound_to_one_model() -> None:
    assert pack_names()
    for name in pack_names():
        cards = [artifact.card for artifact in load_pack(name)]
        assert len({card.name for card in cards}) == len(cards) > 0
        assert len({card.model.model_dump_json() for card in cards}) == 1
        assert all(card.calibrations for card in cards)


@pytest.mark.parametrize("name", ["builtin:nothing", "nothing", "builtin:../packs", "builtin:", "../../etc"])
def test_an_unknown_pack_is_refused(name: str) -> None:
    with pytest.raises(PackError, match="Known: builtin:"):
        load_pack(name)


@given(layer=st.integers(0, 10_000), site=st.sampled_from(Site))
def test_taps_are_read_as_they_are_written(layer: int, site: Site) -> None:
    assert Tap.parse(str(Tap(layer, site))) == Tap(layer, site)


@pytest.mark.parametrize(
    "text", ["resid_post", "resid_post.", "resid_post.-1", "resid_post.1 ", "15", "resid_post.1\n"]
)
def test_a_malformed_tap_is_refused(text: str) -> None:
    with pytest.raises(TapError, match=r"<site>\.<layer>"):
        Tap.parse(text)


def test_all_sites_can_be_named() -> None:
    assert Tap.parse("attn_out.12") == Tap(12, Site.ATTN_OUT)
    assert Tap.parse("mlp_out.0") == Tap(0, Site.MLP_OUT)
    assert Tap.parse("resid_post.3") == Tap(3)


def test_an_unknown_site_is_refused_with_the_nearest() -> None:
    with pytest.raises(TapError, match="Did you mean 'resid_post'"):
        Tap.parse("resid_pos.3")


def test_did_you_mean() -> None:
    assert did_you_mean("DECEPTOIN", ["deception", "bio"]) == "Did you mean 'deception'? Known: bio, deception."
    assert did_you_mean("zzz", ["deception"]) == "Known: deception."
    assert "Nothing" in did_you_mean("x", [])
    assert did_you_mean("x", [f"name{number:02}" for number in range(20)]).endswith(" and 8 more.")
