"""Detectors that cost what real ones cost and never fire: random directions, and the policy that enforces them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probes.aggregate import Aggregator
from probes.aggregate.ema import Ema
from probes.aggregate.mean import Mean
from probes.artifact import save_artifact
from probes.card import Calibration, Card, Format, ModelRef, Stage
from probes.steering.artifact import Safety, SteerCard, save_steer

LAYERS = (7, 15, 23)
STEERED_LAYERS = (23, 27)
"""Above all that is read."""
DIRECTIONS = 64
"""At each tap."""
_SEED = 7
_NEVER = 1e9
"""A threshold far above every residual norm of the embedded model (the sink's, 25,000, is not scored anyway)."""
_DIGEST = "0" * 64


def write_monitored(
    folder: Path,
    model: ModelRef,
    *,
    model_id: str,
    layers: Sequence[int] = LAYERS,
    directions: int = DIRECTIONS,
    steered_layers: Sequence[int] = (),
) -> Path:
    """Write the detectors and a policy that reads all of them.

    The first detector may block at the prompt, all others flag at every token of the reply. Steers, if there are any,
    write to every row of every request.

    Args:
        folder: for the files.
        model: what the cards are bound to.
        model_id: what the policy calls it.
        layers: to tap.
        directions: at each tap.
        steered_layers: after which a steer writes.
    Returns: the policy file.
    """
    rng = np.random.default_rng(_SEED)
    entries: list[dict[str, object]] = []
    rules: list[dict[str, object]] = []
    for layer in layers:
        for number in range(directions):
            name = f"random_{layer}_{number}"
            stage, aggregate = (Stage.STREAM, Ema()) if rules else (Stage.PROMPT, Mean())
            direction = rng.standard_normal(model.d_model)
            tensors = {
                "direction": (direction / np.linalg.norm(direction)).astype(np.float32),
                "mean": np.zeros(model.d_model, dtype=np.float32),
                "scale": np.ones(model.d_model, dtype=np.float32),
                "bias": np.zeros(1, dtype=np.float32),
            }
            path = folder / f"{name}.safetensors"
            save_artifact(path, _card(name, f"resid_post.{layer}", model, stage, aggregate), tensors)
            entries.append({"artifact": path.name})
            rules.append(
                {
                    "name": f"rule-{layer}-{number}",
                    "when": {"detector": name, "stage": stage.value},
                    "do": {"action": "flag" if rules else "block"},
                    "mode": "enforce",
                }
            )
    steers: list[dict[str, object]] = []
    for layer in steered_layers:
        path = folder / f"out_of_reach_{layer}.safetensors"
        direction = rng.standard_normal(model.d_model)
        save_steer(path, _steer_card(path.stem, f"resid_post.{layer}", model), direction / np.linalg.norm(direction))
        steers.append({"name": f"steer-{layer}", "artifact": path.name, "op": "cap", "positions": "all"})
    policy = {
        "name": "bench",
        "on_gap": "block",
        "on_uncalibrated": "block",
        "hold_back": 0,
        "steers": [steer["name"] for steer in steers],
        "rules": rules,
    }
    content = {
        "version": "1",
        "model": model_id,
        "detectors": entries,
        "steers": steers,
        "policies": [policy],
        # The servers are stopped in turns: a canary that is missing for as long as that is no fault here, and would
        # have the next requests blocked.
        "canary": {"deadline": "10m"},
        "reserve": {"directions": directions},
    }
    target = folder / "telltale.yaml"
    target.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    return target


def _card(name: str, tap: str, model: ModelRef, stage: Stage, aggregate: Aggregator) -> Card:
    calibrations = tuple(
        Calibration(
            stage=stage,
            format=fmt,
            aggregate=aggregate,
            threshold=_NEVER,
            target_fpr=0.01,
            num_benign=299,
            top_scores=(_NEVER,),
            data_digest=_DIGEST,
            certified=True,
        )
        for fmt in Format
    )
    return Card(
        name=name,
        kind="linear",
        description="A random direction that never fires: made by telltale bench, of no other use.",
        model=model,
        taps=(tap,),
        formats=tuple(Format),
        skip_first=1,
        tensors_digest=_DIGEST,
        calibrations=calibrations,
    )


def _steer_card(name: str, tap: str, model: ModelRef) -> SteerCard:
    return SteerCard(
        name=name,
        description="A random direction with a ceiling that no row reaches: made by telltale bench, of no other use.",
        model=model,
        tap=tap,
        more_is=Safety.NEUTRAL,
        skip_first=1,
        median_norm=1.0,
        mean=0.0,
        ceiling=_NEVER,
        corpus_rows=1,
        corpus_digest=_DIGEST,
        tensors_digest=_DIGEST,
    )
