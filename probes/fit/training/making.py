"""What every command that makes a detector without a recipe shares: the model's reader before, the card behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.cachedir import user_cache_dir
from probes.card import Card, Format
from probes.detectors import load_detector
from probes.fit.reading.activations import ActivationReader
from probes.fit.training.canary import make_canary
from probes.modelref import read_model_ref
from probes.speaker import Speaker
from probes.taps import Tap

__all__ = ["Making"]

_SERVED_DTYPE = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What a detector is made for.

    Attributes:
        model_dir: folder of the model in transformers' layout.
        model_id: what people call it.
        layer: after which it reads.
        name, description: for the card.
        out: folder for the artifact.
        created_by: version that makes it.
        progress: told what is being done.
        cache_dir: for digests of the model's files; the user's own if None.
    """

    model_dir: Path
    model_id: str
    layer: int
    name: str
    description: str
    out: Path
    created_by: str
    progress: Callable[[str], None]
    cache_dir: Path | None = None

    def reader(self) -> ActivationReader:
        """Of the model, as far up as the layer."""
        cache = self.cache_dir or user_cache_dir()
        model = read_model_ref(self.model_dir, model_id=self.model_id, dtype=_SERVED_DTYPE, cache_dir=cache)
        return ActivationReader(
            self.model_dir, model=model, layers=[self.layer], cache_dir=cache, progress=self.progress
        )

    def finish(
        self,
        reader: ActivationReader,
        kind: str,
        tensors: Mapping[str, npt.NDArray[np.generic]],
        *,
        skip_first: int,
        training: dict[str, Any],
        evaluation: dict[str, Any] | None = None,
        formats: Sequence[Format] = tuple(Format),
        segments: Sequence[Speaker] = (),
    ) -> Artifact:
        """Write the artifact, with a canary on its card.

        Args:
            reader: of the model.
            kind: of the detector.
            tensors: as an artifact of the kind holds them.
            skip_first: leading positions that are never scored.
            training: for the card.
            evaluation: likewise.
            formats: that it may be served in.
            segments: whose text it reads; empty: all.
        """
        card = Card(
            name=self.name,
            kind=kind,
            description=self.description,
            model=reader.model,
            taps=(str(Tap(self.layer)),),
            formats=tuple(formats),
            skip_first=skip_first,
            tensors_digest="0" * 64,
            segments=tuple(segments),
            training=training,
            evaluation=evaluation or {},
            created_by=self.created_by,
        )
        path = self.out / f"{self.name}.safetensors"
        detector = load_detector(Artifact(path, card, tensors))
        canary = make_canary(detector, reader, skip_first=skip_first, dtype=reader.model.dtype)
        return Artifact(path, card.model_copy(update={"canary": canary}), tensors).save(path)
