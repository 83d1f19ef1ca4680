"""Cards, artifacts and plans for tests, small enough to read. Knows no model: digests are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from monitor.policy import Plan, compile_plan
from monitor.yaml_file import PolicyFile, read_policy_file
from probes.aggregate import Aggregator
from probes.aggregate.max import Max
from probes.artifact import Artifact, save_artifact
from probes.card import Calibration, Card, Format, ModelRef, Stage

D_MODEL = 8
NUM_LAYERS = 4
DIGEST = "0" * 64


def model_ref(**changes: Any) -> ModelRef:
    fields: dict[str, Any] = {
        "id": "fake",
        "weight_digest": "a" * 64,
        "tokenizer_digest": "b" * 64,
        "chat_template_digest": "c" * 64,
        "d_model": D_MODEL,
        "num_layers": NUM_LAYERS,
        "dtype": "float32",
    }
    return ModelRef(**(fields | changes))


def calibration(
    stage: Stage = Stage.PROMPT,
    *,
    fmt: Format = Format.CHAT,
    aggregate: Aggregator | None = None,
    threshold: float = 1.0,
    num_benign: int = 1000,
    top_scores: Sequence[float] = (5.0, 4.0, 3.0, 2.0, 1.0),
    certified: bool = True,
) -> Calibration:
    return Calibration(
        stage=stage,
        format=fmt,
        aggregate=aggregate or Max(),
        threshold=threshold,
        target_fpr=0.01,
        num_benign=num_benign,
        top_scores=tuple(top_scores),
        data_digest=DIGEST,
        certified=certified,
    )


def make_card(
    name: str = "harm",
    *,
    kind: str = "linear",
    layers: Sequence[int] = (0,),
    formats: Sequence[Format] = tuple(Format),
    skip_first: int = 1,
    calibrations: Sequence[Calibration] = (),
    model: ModelRef | None = None,
) -> Card:
    return Card(
        name=name,
        kind=kind,
        description="made by a test",
        model=model or model_ref(),
        taps=tuple(f"resid_post.{layer}" for layer in layers),
        formats=tuple(formats),
        skip_first=skip_first,
        tensors_digest=DIGEST,
        calibrations=tuple(calibrations),
    )


def linear_tensors(
    direction: npt.NDArray[np.floating], bias: float = 0.0, **changes: npt.NDArray[np.generic]
) -> dict[str, npt.NDArray[np.generic]]:
    width = len(direction)
    return {
        "direction": direction.astype(np.float32),
        "mean": np.zeros(width, dtype=np.float32),
        "scale": np.ones(width, dtype=np.float32),
        "bias": np.array([bias], dtype=np.float32),
        **changes,
    }


def unit_artifact(card: Card, dimension: int = 0) -> Artifact:
    """In memory: a linear detector whose score is one dimension of the stream."""
    direction = np.zeros(card.model.d_model)
    direction[dimension] = 1.0
    return Artifact(Path(f"{card.name}.safetensors"), card, linear_tensors(direction))


def saved_artifact(folder: Path, card: Card, dimension: int = 0) -> Artifact:
    return save_artifact(folder / f"{card.name}.safetensors", card, unit_artifact(card, dimension).tensors)


def policy_text(rules: str, *, head: str = "", policy: str = "", names: Sequence[str] = ("harm",)) -> str:
    """A policy file; ``rules`` is YAML in flow style, one rule a line."""
    detectors = "".join(f"  - {{artifact: {name}.safetensors}}\n" for name in names)
    lines = "".join(f"      - {line.strip()}\n" for line in rules.strip().splitlines())
    on = "" if "on_gap" in policy else "    on_gap: flag\n"
    uncalibrated = "" if "on_uncalibrated" in policy else "    on_uncalibrated: flag\n"
    extra = "".join(f"    {line.strip()}\n" for line in policy.strip().splitlines())
    return (
        f'version: "1"\n{head}detectors:\n{detectors}policies:\n  - name: default\n{on}{uncalibrated}{extra}'
        f"    rules:\n{lines}"
    )


def rule(
    name: str,
    *,
    detector: str = "harm",
    stage: str = "prompt",
    action: str = "block",
    mode: str = "enforce",
    when: str = "",
) -> str:
    extra = f", {when}" if when else ""
    condition = f"{{detector: {detector}, stage: {stage}{extra}}}"
    return f"{{name: {name}, when: {condition}, do: {{action: {action}}}, mode: {mode}}}"


def write_policy(folder: Path, text: str) -> PolicyFile:
    path = folder / "telltale.yaml"
    path.write_text(text, encoding="utf-8")
    return read_policy_file(path)


def plan_of(folder: Path, text: str, artifacts: Mapping[str, Artifact]) -> Plan:
    file = write_policy(folder, text)
    return compile_plan(file, artifacts, d_model=D_MODEL, num_layers=NUM_LAYERS)
