"""What a decoder layer returns, and what has to be known of its class before it may be read."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from probes.errors import TelltaleError


class LayerError(TelltaleError, ValueError):
    """The model's decoder layers are not known, so that nothing can be said about their residual stream."""


class Convention(Enum):
    """What a decoder layer returns."""

    FUSED = "fused"
    """``(hidden, residual)``; the stream after the layer is their sum, which the next norm takes."""
    PLAIN = "plain"
    """``hidden``, which is the stream."""
    ALONE = "alone"
    """``(hidden, None)``; ``hidden`` is the stream."""
    STALE = "stale"
    """``(hidden, residual)`` where ``hidden`` is the stream already; the residual is older, and never to be added."""

    def stream(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The one or two tensors whose sum is the residual stream.

        Args:
            output: of a layer's forward.
        Raises:
            LayerError: it is not of this convention.
        """
        if self is Convention.PLAIN and isinstance(output, torch.Tensor):
            return output, None
        if self is not Convention.PLAIN and isinstance(output, tuple) and len(output) == len(("hidden", "residual")):
            hidden, residual = output
            fits = residual is None if self is Convention.ALONE else isinstance(residual, torch.Tensor)
            if fits:
                return hidden, residual if self is Convention.FUSED else None
        raise LayerError(
            f"a decoder layer returned {_shape_of(output)}, which is not what its convention {self.value!r} says. "
            "Correct its entry in serving/engine/layers/known.py."
        )

    def replaced(self, output: Any, hidden: torch.Tensor) -> Any:
        """The output of a layer whose first tensor is another one: what is added to it is added to the stream.

        Args:
            output: of a layer's forward, from which ``stream`` could be read.
            hidden: instead of its first tensor.
        """
        return hidden if self is Convention.PLAIN else (hidden, output[1])


@dataclass(frozen=True, slots=True)
class LayerClass:
    """A decoder-layer class that was read.

    Attributes:
        convention: what its forward returns.
        forward_sha256: the first 16 digits of the SHA-256 of its forward's source.
        architectures: model classes that are built of it.
        attention: name of the layer's attention module.
        mlp: name of its MLP or mixture-of-experts module.
        first: name of the module that takes the residual stream first: a norm, or the attention where norms come after.
        attention_norm: a norm between the attention module's output and the stream.
        mlp_norm: the same for the MLP.
        multiplier: of a layer, what both outputs are multiplied by on their way into the stream.
        layers: where the list of layers is, from the language model's class.
        final_norm: where the norm is that takes the stream after the last layer.
    """

    convention: Convention
    forward_sha256: str
    architectures: tuple[str, ...]
    attention: str = "self_attn"
    mlp: str = "mlp"
    first: str = "input_layernorm"
    attention_norm: str | None = None
    mlp_norm: str | None = None
    multiplier: Callable[[Any], float] | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"


def source_digest(function: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]  # type: ignore[arg-type]


def _shape_of(output: Any) -> str:
    if isinstance(output, tuple):
        return f"({', '.join(type(part).__name__ for part in output)})"
    return f"a {type(output).__name__}"
