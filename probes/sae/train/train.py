"""From a file of settings to a sparse autoencoder with its card, and its figures again later."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from probes.cachedir import user_cache_dir
from probes.card import ModelRef
from probes.errors import TelltaleError
from probes.fit.reading.random_init import RandomModel, random_model
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext
from probes.modelref import read_model_ref
from probes.sae.file import Precision, SaeCard, SaeFile, load_sae, save_sae
from probes.sae.sae import Activation, Sae
from probes.sae.train.config import SaeConfig, read_config
from probes.sae.train.evaluation import evaluate_sae, measure_without_model
from probes.sae.train.export import exported
from probes.sae.train.material import Material, collected_material, corpus_material
from probes.sae.train.reconstruction import measure_reconstruction
from probes.sae.train.trainer import StepFigures, train_autoencoder
from probes.taps import Tap

__all__ = ["Progress", "SaeTrainingError", "evaluate_file", "train_sae"]

_SERVED_DTYPE = "float32"
_RANDOM = "_random_weights"


class SaeTrainingError(TelltaleError, ValueError):
    """What was asked for cannot be trained or measured together."""


class Progress(Protocol):
    """Is told how far it is."""

    def say(self, text: str) -> None:
        """One line."""

    def advance(self, label: str, done: int, total: int, note: str = "") -> None:
        """Something that takes long: so much of so much, and what it finds meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    config: SaeConfig
    folder: Path
    model_dir: Path
    model: ModelRef
    cache_dir: Path
    progress: Progress

    @property
    def tap(self) -> Tap:
        return Tap.parse(self.config.tap)

    def material(self) -> Material:
        config = self.config
        if config.collected is not None:
            return collected_material(config.collected, model=self.model, tap=self.tap)
        if config.corpus is None:
            raise SaeTrainingError("the file names neither 'corpus' nor 'collected'. Give one of them.")
        wheels = WheelStore(folder=self.cache_dir / "wheels", progress=self.progress.say)
        return corpus_material(
            config.corpus,
            SourceContext(wheels=wheels, folder=self.folder, seed=config.seed),
            model_dir=self.model_dir,
            model=self.model,
            tap=self.tap,
            cache_dir=self.cache_dir,
            advance=self.progress.advance,
        )


def train_sae(
    config_path: Path,
    *,
    model_dir: Path,
    model_id: str,
    out: Path,
    progress: Progress,
    random_weights: bool = False,
    cache_dir: Path | None = None,
) -> SaeFile:
    """Read, train, measure and write ``NAME.safetensors`` with its card.

    Rows that were read and the state of a training are kept in the cache: what was killed goes on when the same is
    asked for again.

    Args:
        config_path: see ``probes.sae.train.config``.
        model_dir: folder in transformers' layout.
        model_id: its name for people.
        out: folder for both files.
        progress: told how far it is.
        random_weights: train on the same architecture with random weights instead, as a control: what comes out fits
            no served model, has no cross entropy, and ``_random_weights`` behind its name.
        cache_dir: another one than the user's own.
    Raises:
        TelltaleError: of the file, the texts, the model or the rows; the text says which.
    """
    config = read_config(config_path)
    cache = cache_dir or user_cache_dir()
    model = read_model_ref(model_dir, model_id=model_id, dtype=_SERVED_DTYPE, cache_dir=cache)
    if random_weights and config.collected is not None:
        raise SaeTrainingError(
            f"{config_path}: its rows were collected from the model itself, so there are none with random weights. "
            "Train the control on texts: give 'corpus'."
        )
    depth = Tap.parse(config.tap).layer + 1
    context = (
        random_model(model_dir, model=model, depth=depth, seed=config.seed, folder=cache / "random-init")
        if random_weights
        else nullcontext(RandomModel(model_dir, model))
    )
    with context as chosen:
        run = _Run(
            config=config,
            folder=config_path.parent,
            model_dir=chosen.path,
            model=chosen.model,
            cache_dir=cache,
            progress=progress,
        )
        material = run.material()
        progress.say(
            f"{config.name}: {len(material.train):,} rows to train on, {len(material.held_out_rows):,} held out, "
            f"{material.skip_first} leading sink(s)"
        )
        sae = _train(run, material)
        evaluation = _evaluate(run, sae, material, spliced=not random_weights)
        progress.say("measuring how often each latent is active")
        seen = measure_reconstruction(sae, material.train)
        suffix = _RANDOM if random_weights else ""
        card = SaeCard(
            name=f"{config.name}{suffix}",
            description=config.description,
            model=chosen.model,
            skip_first=material.skip_first,
            tensors_digest="0" * 64,
            tap=config.tap,
            width=sae.width,
            activation=sae.activation,
            precision=Precision.FLOAT16,
            origin="telltale sae train",
            corpus=material.corpus,
            licence=config.licence,
            median_norm=seen.median_norm,
            corpus_rows=seen.rows,
            corpus_digest=material.digest,
            training={
                "config": config.model_dump(mode="json", exclude={"collected"}),
                **material.record,
                "on_training_rows": {
                    "fvu": round(seen.fvu, 4),
                    "l0": round(seen.l0, 4),
                    "dead_share": round(seen.dead_share, 4),
                },
            },
            evaluation=evaluation,
            created_by=_created_by(),
        )
        made = save_sae(out / f"{card.name}.safetensors", sae, card, density=seen.density)
        # Not before: what is killed while it is measured need not be trained again.
        _state(run, material).unlink(missing_ok=True)
        return made


def evaluate_file(
    path: Path,
    config_path: Path,
    *,
    model_dir: Path,
    model_id: str,
    progress: Progress,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """The figures of any sparse autoencoder on the held-out requests of a file of settings.

    Args:
        path: of the autoencoder.
        config_path: whose texts, and whose tap.
        model_dir: folder in transformers' layout.
        model_id: its name for people.
        progress: told how far it is.
        cache_dir: another one than the user's own.
    Raises:
        SaeTrainingError: it reads another tap, or is a transcoder.
        TelltaleError: of a file, the texts, the model or the rows; the text says which.
    """
    stored = load_sae(path)
    config = read_config(config_path)
    cache = cache_dir or user_cache_dir()
    model = read_model_ref(model_dir, model_id=model_id, dtype=_SERVED_DTYPE, cache_dir=cache)
    stored.require_model(model)
    if stored.card.tap != config.tap:
        raise SaeTrainingError(
            f"{path}: reads {stored.card.tap}, {config_path} reads {config.tap}. Give a file of settings with the tap "
            "of the autoencoder."
        )
    if stored.card.output_tap not in {None, stored.card.tap}:
        raise SaeTrainingError(
            f"{path}: predicts {stored.card.output_tap} from {stored.card.tap}: a transcoder does not give back what "
            "it reads, so these figures say nothing of it. Measure autoencoders."
        )
    run = _Run(
        config=config, folder=config_path.parent, model_dir=model_dir, model=model, cache_dir=cache, progress=progress
    )
    return _evaluate(run, stored.sae(), run.material(), spliced=True)


def _train(run: _Run, material: Material) -> Sae:
    settings = run.config.training

    def tell(figures: StepFigures) -> None:
        note = f"FVU {figures.fvu:.3f}, L0 {figures.l0:.1f}, dead {figures.dead:.1%}"
        run.progress.advance("training", figures.step, figures.steps, note)

    trained = train_autoencoder(material.train, settings, checkpoint=_state(run, material), on_step=tell)
    return exported(trained, tap=run.tap, activation=Activation(settings.activation.kind))


def _state(run: _Run, material: Material) -> Path:
    """Trainings that may go on beside each other have different names; what they are is checked by their digests."""
    name = f"{run.config.name}-{run.model.weight_digest[:12]}-{material.digest[:12]}.safetensors"
    return run.cache_dir / "sae-training" / name


def _evaluate(run: _Run, sae: Sae, material: Material, *, spliced: bool) -> dict[str, Any]:
    if not spliced:
        return measure_without_model(sae, material, seed=run.config.seed)
    return evaluate_sae(
        sae, material, model_dir=run.model_dir, model=run.model, seed=run.config.seed, progress=run.progress.say
    )


def _created_by() -> str:
    try:
        return f"telltale {metadata.version('telltale')}"
    except metadata.PackageNotFoundError:
        return "telltale, from a source folder"
