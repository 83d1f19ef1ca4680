"""One deployment: a policy file, its artifacts and the served model, joined and checked. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from monitor.entries import DetectorEntry
from monitor.policy import Plan, compile_plan
from monitor.yaml_file import PolicyError, PolicyFile, read_policy_file
from probes.artifact import Artifact
from probes.card import ModelRef
from probes.modelref import read_model_ref
from probes.packs import PackError, load_pack
from probes.sae.file import SaeFile, load_sae
from probes.sae.latent_artifact import latent_artifact
from probes.sae.latent_steer import LatentSteer
from probes.sae.sae import SaeError
from probes.steering.artifact import SteerArtifact
from probes.taps import Tap
from serving.explainer import Explainer, find_explainer
from serving.sae_path import sae_path


@dataclass(frozen=True, slots=True)
class Deployment:
    """What every process of a server runs on.

    Attributes:
        file: the policy file.
        artifacts: by the name that rules use.
        model: the served model.
        plan: ready to run.
        explainer: by what flags are explained; None where they are not.
    """

    file: PolicyFile
    artifacts: Mapping[str, Artifact]
    model: ModelRef
    plan: Plan
    explainer: Explainer | None = None

    @property
    def explained_tap(self) -> Tap | None:
        """Whose whole rows may be asked for; None where flags are not explained."""
        return None if self.explainer is None else self.explainer.tap


def load_artifacts(file: PolicyFile) -> dict[str, Artifact]:
    """The artifacts of a policy file's ``detectors``, by the name that its rules use.

    Raises:
        PolicyError: a pack is unknown, a latent does not exist, or two detectors have one name.
        probes.artifact.ArtifactError: a file is missing or damaged.
    """
    found: dict[str, Artifact] = {}
    opened: dict[Path, SaeFile] = {}
    for number, entry in enumerate(file.config.detectors):
        where: tuple[str | int, ...] = ("detectors", number)
        if entry.pack is not None:
            try:
                loaded = [(artifact.card.name, artifact) for artifact in load_pack(entry.pack)]
            except PackError as error:
                raise file.error((*where, "pack"), str(error)) from error
        elif entry.sae is not None:
            loaded = [(entry.name or "", _latents(file, number, entry, opened))]
        else:
            artifact = Artifact.load(file.resolve(entry.artifact or ""))
            loaded = [(entry.name or artifact.card.name, artifact)]
        for name, artifact in loaded:
            if name in found:
                raise file.error(where, f"a detector named {name!r} stands above already. Give one another 'name'.")
            found[name] = artifact
    return found


def _latents(file: PolicyFile, number: int, entry: DetectorEntry, opened: dict[Path, SaeFile]) -> Artifact:
    path = sae_path(file, ("detectors", number, "sae"), entry.sae or "")
    if path not in opened:
        opened[path] = load_sae(path)
    try:
        return latent_artifact(
            opened[path],
            entry.latents or (),
            name=entry.name or "",
            combine=entry.combined,
            weights=entry.weights or (),
            intercept=entry.intercept,
        )
    except SaeError as error:
        raise file.error(("detectors", number, "latents"), str(error)) from error


def load_steers(file: PolicyFile) -> dict[str, SteerArtifact | LatentSteer]:
    """What a policy file's ``steers`` write along, by the steer's name.

    Raises:
        PolicyError: a sparse autoencoder that does not ship is asked for.
        probes.artifact.ArtifactError: a file is missing or damaged.
    """
    found: dict[str, SteerArtifact | LatentSteer] = {}
    for number, entry in enumerate(file.config.steers):
        if entry.sae is not None and entry.latent is not None:
            path = sae_path(file, ("steers", number, "sae"), entry.sae)
            found[entry.name] = LatentSteer(load_sae(path), entry.latent, entry.more_is)
        else:
            found[entry.name] = SteerArtifact.load(file.resolve(entry.artifact or ""))
    return found


def deploy(policy: Path, *, model_dir: Path, model_id: str, dtype: str, chat_template: str | None = None) -> Deployment:
    """Join a policy file with the model that is to be served.

    Args:
        policy: the policy file.
        model_dir: folder with the model's weights, config and tokenizer.
        model_id: what people call the model.
        dtype: of the weights as served, e.g. ``float32``.
        chat_template: the template's text where it is not the model's own.
    Raises:
        PolicyError: the file is wrong.
        probes.artifact.ArtifactError: an artifact is damaged or belongs to another model.
        probes.modelref.ModelRefError: the folder holds no model.
        probes.bank.BankError: the directions do not fit.
    """
    file = read_policy_file(policy)
    artifacts = load_artifacts(file)
    model = read_model_ref(model_dir, model_id=model_id, dtype=dtype, chat_template=chat_template)
    steers = load_steers(file)
    for artifact in artifacts.values():
        artifact.require_model(model)
    for steer in steers.values():
        steer.require_model(model)
    plan = compile_plan(file, artifacts, steers, d_model=model.d_model, num_layers=model.num_layers)
    return Deployment(file, artifacts, model, plan, find_explainer(file, model))


def check_policy(policy: Path) -> Plan:
    """What ``telltale check`` does: everything that can be checked without a model.

    Raises:
        PolicyError: the file is wrong, or its detectors belong to different models.
        probes.artifact.ArtifactError: an artifact is missing or damaged.
        probes.bank.BankError: the directions do not fit into the reserved room.
    """
    file = read_policy_file(policy)
    artifacts, steers = load_artifacts(file), load_steers(file)
    first_name, first = next(iter(artifacts.items()))
    made: list[tuple[str, Artifact | SteerArtifact | LatentSteer]] = [*artifacts.items(), *steers.items()]
    for name, artifact in made:
        if artifact.card.model.differing(first.card.model):
            raise PolicyError(
                f"{policy}: {first.what} {first_name!r} and {artifact.what} {name!r} were made on different models "
                f"({first.card.model.id!r}, {artifact.card.model.id!r}). One server serves one model."
            )
    model = first.card.model
    find_explainer(file, model)
    return compile_plan(file, artifacts, steers, d_model=model.d_model, num_layers=model.num_layers)
