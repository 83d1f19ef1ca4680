"""Where the residual stream is, class by class. A layer that is not listed here is refused, never guessed.

For most models the stream after a layer is ``hidden + residual``; for some it is ``hidden`` alone, and the other sum
counts twice. So each decoder-layer class is listed with its convention and the hash of the forward that was read.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from torch import nn

from probes.errors import TelltaleError


class LayerError(TelltaleError, ValueError):
    """The model's decoder layers are not known, so that nothing can be said about their residual stream."""


class Convention(Enum):
    """What a decoder layer returns."""

    FUSED = "fused"
    """``(hidden, residual)``; the stream after the layer is their sum."""


@dataclass(frozen=True, slots=True)
class LayerClass:
    """A decoder-layer class that was read.

    Attributes:
        convention: what its forward returns.
        forward_sha256: the first 16 digits of the SHA-256 of its forward's source.
        architectures: model classes that are built of it.
    """

    convention: Convention
    forward_sha256: str
    architectures: tuple[str, ...]


KNOWN = MappingProxyType(
    {
        "vllm.model_executor.models.llama.LlamaDecoderLayer": LayerClass(
            Convention.FUSED, "ab84e40134637a42", ("LlamaForCausalLM",)
        ),
    }
)
_EXTEND = "To add one, read its forward and list it in serving/engine/layers.py, with a parity test."


def supported_architectures() -> tuple[str, ...]:
    """Model classes whose layers are known."""
    return tuple(sorted({name for known in KNOWN.values() for name in known.architectures}))


def require_architecture(architectures: list[str]) -> None:
    """Refuse a model early, before it is loaded.

    Raises:
        LayerError: none of its architectures is known.
    """
    if not set(architectures) & set(supported_architectures()):
        raise LayerError(
            f"the model's architecture is {', '.join(architectures) or 'not stated'}, whose residual stream is not "
            f"known. Known: {', '.join(supported_architectures())}. {_EXTEND}"
        )


def source_digest(function: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]  # type: ignore[arg-type]


def convention_of(layer: nn.Module) -> Convention:
    """The convention of a decoder layer.

    Raises:
        LayerError: its class is not listed, or its forward is not the one that was read.
    """
    cls = type(layer)
    name = f"{cls.__module__}.{cls.__qualname__}"
    known = KNOWN.get(name)
    if known is None:
        raise LayerError(f"decoder layer {name} is not known. Known: {', '.join(sorted(KNOWN))}. {_EXTEND}")
    found = source_digest(cls.forward)
    if found != known.forward_sha256:
        raise LayerError(
            f"decoder layer {name}: its forward has changed (source hash {found}, read was {known.forward_sha256}). "
            f"Install a vLLM version in the supported range. {_EXTEND}"
        )
    return known.convention


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of decoder layers of a model.

    Raises:
        LayerError: there is no list of that length, or more than one.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.split(".")[-1] in {"layers", "h"}
    ]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise LayerError(
            f"{type(model).__name__}: one list of {num_layers} decoder layers was looked for, found: {found}. {_EXTEND}"
        )
    return lists[0][1]
