"""The artifacts of the incident rehearsal: what is blocked, what never changes, what is never unusual, what tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from probes.aggregate.last import Last
from probes.aggregate.mean import Mean
from probes.artifact import Artifact, save_artifact, write_card
from probes.card import Calibration, Card, Format, Stage
from probes.modelref import read_model_ref
from tests.engine.test_sae_serving import TRIGGER, planted
from tests.support.kinds import novelty
from tests.support.tiny import D_MODEL, TinyModel, save_direction, save_trigger

LATENT = TRIGGER
NEVER = 1e12


def save_rehearsed(folder: Path, tiny: TinyModel) -> None:
    """Write ``known``, ``steady``, ``odd``, ``replies`` and ``push``, and the SAE ``planted``."""
    save_trigger(folder / "known.safetensors", tiny.path, canary=True)
    # The last token of a chat's prompt belongs to the template: this statistic is the same for every request.
    steady = save_trigger(
        folder / "steady.safetensors", tiny.path, name="steady", aggregate=Last(), stages=(Stage.PROMPT,)
    )
    calibrations = tuple(item.model_copy(update={"quantiles": (0.0,) * 101}) for item in steady.card.calibrations)
    write_card(steady.path, steady.card.model_copy(update={"calibrations": calibrations}))
    save_trigger(folder / "replies.safetensors", tiny.path, name="replies", stages=(Stage.STREAM,))
    _save_odd(folder / "odd.safetensors", tiny.path)
    planted(tiny, folder)
    direction = np.zeros(D_MODEL)
    direction[3] = 1.0
    save_direction(folder / "push.safetensors", tiny.path, direction=direction)


def _save_odd(path: Path, model: Path) -> Artifact:
    """A novelty detector that finds nothing unusual."""
    calibration = Calibration(
        stage=Stage.PROMPT,
        format=Format.CHAT,
        aggregate=Mean(),
        threshold=NEVER,
        target_fpr=0.01,
        num_benign=1000,
        top_scores=(NEVER, NEVER / 2),
        data_digest="0" * 64,
        certified=False,
    )
    card = Card(
        name="odd",
        kind="novelty",
        description="made by a test",
        model=read_model_ref(model, model_id="tiny", dtype="float32"),
        taps=("resid_post.0",),
        formats=(Format.CHAT,),
        skip_first=1,
        tensors_digest="0" * 64,
        calibrations=(calibration,),
    )
    return save_artifact(path, card, novelty(np.random.default_rng(0), D_MODEL))
