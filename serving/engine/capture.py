"""The bank that captures activations: at each tap, every direction of the space. It is no detector that is shipped.

What it reads is ``s @ I + 0`` by the operator that reads detectors' directions, so it is bit by bit what detectors are
scored on. Its taps travel in vLLM's own configuration, which no policy file writes; an engine with a policy refuses
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from probes.artifact import Artifact, ArtifactError
from probes.bank import Bank
from probes.detectors.base import Detector, Directions, Float64
from probes.taps import Tap

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CAPTURE_KEY = "telltale_capture"
"""Under it vLLM's ``additional_config`` lists the taps; part of its compile-cache key, handed to every worker."""
_NAME = "capture"


class Capture(Detector):
    """Reads every dimension at some taps.

    It lies outside of ``probes.detectors``, so that discovery does not find it and no artifact can ask for it.

    Args:
        taps: where.
        d_model: width of the residual stream.
    """

    kind = "capture"

    def __init__(self, taps: Sequence[Tap], d_model: int) -> None:
        super().__init__(_NAME)
        self._taps = tuple(taps)
        self._d_model = d_model

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """There are no artifacts of this kind.

        Raises:
            ArtifactError: always.
        """
        raise ArtifactError(
            f"{artifact.path}: {name!r} cannot be served: activations are captured by telltale collect."
        )

    def directions(self) -> Sequence[Directions]:
        """The identity at each tap."""
        return [Directions(tap, np.eye(self._d_model), np.zeros(self._d_model)) for tap in self._taps]

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """How large what is read is, over all taps: a detector has a score, although a capture asks for none."""
        found: Float64 = np.sqrt(np.sum([np.square(values).sum(axis=1) for values in readouts.values()], axis=0))
        return found


def capture_bank(taps: Sequence[Tap], *, d_model: int, num_layers: int) -> Bank:
    """The bank of a capture: ``d_model`` columns at each tap, then the squared norm.

    Args:
        taps: to read; in any order, each once.
        d_model: width of the residual stream.
        num_layers: decoder layers of the model.
    Raises:
        probes.bank.BankError: a tap is listed twice or lies beyond the last layer.
    """
    return Bank([Capture(taps, d_model)], d_model=d_model, num_layers=num_layers, capacity=d_model)


def captured_taps(config: VllmConfig) -> tuple[Tap, ...]:
    """What an engine captures; nothing if it serves.

    Raises:
        probes.taps.TapError: its configuration names something else than taps.
    """
    additional: Any = config.additional_config
    listed = additional.get(CAPTURE_KEY, ()) if isinstance(additional, dict) else ()
    return tuple(Tap.parse(str(tap)) for tap in listed)
