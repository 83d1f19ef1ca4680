"""Policy file, artifacts and model are joined, or refused with what does not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monitor.yaml_file import PolicyError, read_policy_file
from probes.artifact import ArtifactError, save_artifact
from probes.card import ModelRef
from probes.modelref import ModelRefError, read_model_ref
from probes.packs import pack_names
from serving.deployment import check_policy, deploy, load_artifacts
from tests.unit.artifacts import (
    D_MODEL,
    NUM_LAYERS,
    calibration,
    make_card,
    model_ref,
    policy_text,
    rule,
    unit_artifact,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A folder with the files that a model is told apart by; nothing in it can be loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": D_MODEL, "num_hidden_layers": NUM_LAYERS}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def ref_of(model_dir: Path) -> ModelRef:
    return read_model_ref(model_dir, model_id="fake", dtype="float32")


def write(folder: Path, *names: str, model: ModelRef | None = None, rules: str = "", **card: Any) -> Path:
    """A policy file beside its artifacts."""
    for name in names:
        made = make_card(name, model=model or model_ref(), calibrations=[calibration()], **card)
        save_artifact(folder / f"{name}.safetensors", made, unit_artifact(made).tensors)
    path = folder / "telltale.yaml"
    path.write_text(policy_text(rules or rule("r", detector=names[0]), names=names))
    return path


def deploy_here(policy: Path, model_dir: Path, **settings: Any) -> Any:
    return deploy(policy, model_dir=model_dir, **({"model_id": "fake", "dtype": "float32"} | settings))


def test_what_fits_is_deployed(tmp_path: Path, model_dir: Path) -> None:
    policy = write(tmp_path, "harm", "other", model=ref_of(model_dir))
    deployment = deploy_here(policy, model_dir)
    assert list(deployment.artifacts) == list(deployment.plan.cards) == ["harm", "other"]
    assert deployment.model == ref_of(model_dir)
    assert [str(tap) for tap in deployment.plan.bank.taps] == ["resid_post.0"]
    # Equal in every process: the digest does not depend on who loads it.
    assert deployment.plan.digest == deploy_here(policy, model_dir).plan.digest == check_policy(policy).digest


def test_another_model_is_refused(tmp_path: Path, model_dir: Path) -> None:
    policy = write(tmp_path, "harm", model=ref_of(model_dir))
    for settings, field in (({"dtype": "bfloat16"}, "dtype"), ({"chat_template": "other"}, "chat_template_digest")):
        with pytest.raises(ArtifactError, match=rf"Differing: {field} \(card"):
            deploy_here(policy, model_dir, **settings)
    (model_dir / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ArtifactError, match=r"Differing: weight_digest \(card"):
        deploy_here(policy, model_dir)
    with pytest.raises(ModelRefError, match="not a folder"):
        deploy_here(policy, tmp_path / "nothing")


def test_paths_are_relative_to_the_policy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = write(tmp_path, "harm")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert list(load_artifacts(read_policy_file(policy))) == ["harm"]


def test_an_artifact_can_be_renamed(tmp_path: Path) -> None:
    policy = write(tmp_path, "harm", rules=rule("r", detector="mine"))
    policy.write_text(policy.read_text().replace("harm.safetensors", "harm.safetensors, name: mine"))
    plan = check_policy(policy)
    assert list(plan.cards) == [detector.name for detector in plan.bank.detectors] == ["mine"]


def test_two_detectors_of_one_name_are_refused(tmp_path: Path) -> None:
    policy = write(tmp_path, "harm", "other")
    policy.write_text(policy.read_text().replace("other.safetensors", "harm.safetensors"))
    with pytest.raises(PolicyError, match=r"telltale\.yaml:4: detectors\[1\]: a detector named 'harm' stands above"):
        check_policy(policy)


def test_an_unknown_pack_is_refused_with_its_place(tmp_path: Path) -> None:
    policy = write(tmp_path, "harm")
    policy.write_text(policy.read_text().replace("{artifact: harm.safetensors}", "pack: builtin:smolm2"))
    with pytest.raises(PolicyError, match=r"telltale\.yaml:3: detectors\[0\]\.pack: .*Known: builtin:"):
        check_policy(policy)


@pytest.mark.parametrize("name", pack_names())
def test_a_shipped_pack_is_checked_without_its_model(tmp_path: Path, name: str) -> None:
    policy = write(tmp_path, "harm")
    text = policy.read_text().replace("{artifact: harm.safetensors}", f"pack: {name}")
    policy.write_text(text)
    with pytest.raises(PolicyError, match=r"when\.detector: is 'harm'.* Known: "):
        check_policy(policy)
    first = next(iter(load_artifacts(read_policy_file(policy))))
    policy.write_text(text.replace("detector: harm", f"detector: {first}"))
    assert first in check_policy(policy).cards


def test_a_missing_artifact_is_named(tmp_path: Path) -> None:
    policy = write(tmp_path, "harm")
    (tmp_path / "harm.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"harm\.safetensors: cannot be read"):
        check_policy(policy)


def test_detectors_of_different_models_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "other", model=model_ref(id="another", weight_digest="f" * 64))
    write(tmp_path, "harm")
    policy = tmp_path / "telltale.yaml"
    policy.write_text(policy_text(rule("r"), names=["harm", "other"]))
    with pytest.raises(
        PolicyError, match=r"detector 'harm' and detector 'other' were made on different models \('fake', 'another'\)"
    ):
        check_policy(policy)
