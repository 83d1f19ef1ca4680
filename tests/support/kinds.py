"""Random tensors of every kind of detector, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.aggregate.attention import Attention
from probes.aggregate.delta import Delta
from probes.aggregate.multimax import MultiMax

Tensors = dict[str, npt.NDArray[np.generic]]
HEADS = 3


def standard_units(rng: np.random.Generator, *shape: int) -> Tensors:
    return {"mean": rng.standard_normal(shape) * 3, "scale": rng.uniform(0.5, 2.0, shape)}


def linear(rng: np.random.Generator, width: int) -> Tensors:
    return {**standard_units(rng, width), "direction": rng.standard_normal(width), "bias": rng.standard_normal(1)}


def ensemble(rng: np.random.Generator, width: int) -> Tensors:
    return {
        **standard_units(rng, 2, width),
        "direction": rng.standard_normal((2, width)),
        "bias": rng.standard_normal(2),
        "share": rng.uniform(0.2, 1.0, 2),
    }


def attention(rng: np.random.Generator, width: int) -> Tensors:
    query, value = rng.standard_normal((2, HEADS, width))
    return {**standard_units(rng, width), "query": query, "value": value, "bias": rng.standard_normal(HEADS)}


def multimax(rng: np.random.Generator, width: int) -> Tensors:
    value = rng.standard_normal((HEADS, width))
    return {**standard_units(rng, width), "value": value, "bias": rng.standard_normal(HEADS)}


def mlp(rng: np.random.Generator, width: int) -> Tensors:
    return {
        **standard_units(rng, width),
        "hidden": rng.standard_normal((5, width)),
        "hidden_bias": rng.standard_normal(5),
        "out": rng.standard_normal(5),
        "out_bias": rng.standard_normal(1),
    }


def novelty(rng: np.random.Generator, width: int, count: int = 3) -> Tensors:
    components = np.linalg.qr(rng.standard_normal((width, width)))[0][:count]
    return {
        "mean": rng.standard_normal(width),
        "components": components,
        "variance": rng.uniform(1.0, 9.0, count),
        "rest_variance": np.array([0.5]),
    }


def lens(rng: np.random.Generator, width: int) -> Tensors:
    tokens, contrast = rng.standard_normal((2, width)), rng.standard_normal((4, width))
    return {"tokens": tokens, "contrast": contrast, "epsilon": np.array([1e-5])}


def drift(rng: np.random.Generator, width: int) -> Tensors:
    return {"direction": rng.standard_normal(width), "scale": rng.uniform(0.5, 2.0, width)}


def sae_latent(rng: np.random.Generator, width: int) -> Tensors:
    return {
        "encoder": rng.standard_normal((4, width)),
        "encoder_bias": rng.standard_normal(4),
        "threshold": rng.uniform(0.0, 3.0, 4),
    }


MAKE: dict[str, Callable[[np.random.Generator, int], Tensors]] = {
    "attention": attention,
    "drift": drift,
    "ensemble": ensemble,
    "lens": lens,
    "linear": linear,
    "mlp": mlp,
    "multimax": multimax,
    "novelty": novelty,
    "sae_latent": sae_latent,
}
LAYERS: Mapping[str, tuple[int, ...]] = {"ensemble": (0, 2)}
AGGREGATE: Mapping[str, Aggregator] = {
    "attention": Attention(heads=HEADS),
    "drift": Delta(),
    "multimax": MultiMax(heads=HEADS),
}
