"""What latents cost on a row beside linear probes: ``pytest tests/bench/test_sae_cost.py``, on an idle machine.

All go through the bank as an engine would: one true float32 product with the reserved columns, then the scorer. The
product has the same width whatever is in it, so both are also measured with a bank that is just wide enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from probes.artifact import Artifact
from probes.bank import Bank
from probes.detectors import Detector, load_detector
from probes.sae.combine import Combine
from probes.sae.file import Precision, SaeCard, SaeFile
from probes.sae.latent_artifact import latent_artifact
from probes.sae.sae import Activation, Sae
from probes.taps import Tap
from tests.unit.artifacts import DIGEST, linear_tensors, make_card, model_ref

D_MODEL, WIDTH, LATENTS = 576, 16_384, 20
ROWS = [1, 64, 2048]
Float32 = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def sae() -> Sae:
    rng = np.random.default_rng(0)
    encoder = rng.normal(size=(WIDTH, D_MODEL)) / np.sqrt(D_MODEL)
    return Sae.folded(
        tap=Tap(0),
        activation=Activation.JUMPRELU,
        encoder=encoder,
        encoder_bias=rng.normal(size=WIDTH),
        decoder=encoder,
        decoder_bias=np.zeros(D_MODEL),
        threshold=1.0,
    )


def probes() -> list[Detector]:
    rng = np.random.default_rng(1)
    model = model_ref(d_model=D_MODEL)
    cards = [make_card(f"probe_{number}", model=model) for number in range(LATENTS)]
    made = [Artifact(Path("p.safetensors"), card, linear_tensors(rng.normal(size=D_MODEL))) for card in cards]
    return [load_detector(artifact) for artifact in made]


def latents(sae: Sae, groups: Sequence[Sequence[int]]) -> list[Detector]:
    card = SaeCard(
        name="random",
        description="drawn by a benchmark",
        model=model_ref(d_model=D_MODEL),
        skip_first=1,
        tensors_digest=DIGEST,
        tap=str(sae.tap),
        width=sae.width,
        activation=sae.activation,
        precision=Precision.FLOAT32,
        origin="a benchmark",
        corpus="none",
        licence="none",
    )
    names = ("encoder", "encoder_bias", "threshold", "decoder", "decoder_bias")
    stored = SaeFile(Path("s.safetensors"), card, {name: getattr(sae, name) for name in names})
    made = [latent_artifact(stored, group, name=f"l{i}", combine=Combine.MAX) for i, group in enumerate(groups)]
    return [load_detector(artifact) for artifact in made]


def served(detectors: Sequence[Detector], rows: Float32) -> Callable[[], npt.NDArray[np.float64]]:
    """What a step does: the product into a row of readouts, the squared norm, the scores."""
    bank = Bank(detectors, d_model=D_MODEL, num_layers=1, capacity=LATENTS)
    (matrix,) = bank.matrices
    readouts = np.empty((len(rows), bank.width), dtype=np.float32)

    def step() -> npt.NDArray[np.float64]:
        np.matmul(rows, matrix.weight, out=readouts[:, :LATENTS])
        readouts[:, :LATENTS] += matrix.bias
        np.einsum("nd,nd->n", rows, rows, out=readouts[:, LATENTS])
        return bank.score(readouts)

    return step


@pytest.mark.parametrize("what", ["probes", "single_latents", "one_of_all", "full_encode"])
@pytest.mark.parametrize("rows", ROWS)
def test_twenty_latents(benchmark: Any, sae: Sae, what: str, rows: int) -> None:
    stream = np.random.default_rng(2).normal(size=(rows, D_MODEL)).astype(np.float32)
    steps: dict[str, Callable[[], Any]] = {
        "probes": lambda: served(probes(), stream),
        "single_latents": lambda: served(latents(sae, [[number * 811] for number in range(LATENTS)]), stream),
        "one_of_all": lambda: served(latents(sae, [[number * 811 for number in range(LATENTS)]]), stream),
        "full_encode": lambda: lambda: sae.encode(stream),
    }
    step = steps[what]()
    rounds = 20 if what == "full_encode" else 500
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=5, iterations=1)
