"""Many linear probes at the same taps, read in one pass: controls cost one more run of the model, not hundreds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.card import Stage
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import ActivationSource
from probes.fit.training.linear_probe import LinearProbe
from probes.taps import Tap

__all__ = ["probe_statistics"]

Float64 = npt.NDArray[np.float64]


def probe_statistics(
    probes: Sequence[LinearProbe],
    requests: Sequence[Rendered],
    source: ActivationSource,
    *,
    taps: Sequence[Tap],
    aggregate: Aggregator,
    stage: Stage,
    skip_first: int,
    label: str,
) -> Float64:
    """The statistic that each probe would be judged by on each request, as a server computes it.

    Args:
        probes: K, of the taps' widths side by side.
        requests: n.
        source: of their activations.
        taps: where all probes read.
        aggregate: how token scores become one number.
        stage: when it is judged.
        skip_first: leading positions that are not scored.
        label: what the requests are, for progress.
    Returns: (K, n); minus infinity where the statistic is not defined.
    """
    weights = np.stack([probe.weight for probe in probes], axis=1)
    biases = np.array([probe.constant for probe in probes])
    found = np.full((len(probes), len(requests)), -np.inf)
    for number, activations in source.sweep(requests, taps, label=label):
        positions = requests[number].positions(skip_first)
        if positions.size == 0:
            continue
        rows = np.concatenate([activations[tap][positions[0] :] for tap in taps], axis=1)
        scores = rows.astype(np.float64) @ weights + biases
        running = aggregate.update(aggregate.new_state(1, len(probes)), scores[:, None, :])[:, 0]
        found[:, number] = running.max(axis=0) if stage is Stage.STREAM else running[-1]
    return found
