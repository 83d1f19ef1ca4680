"""The decoder layers of a loaded model, found by the paths of the classes that were read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from serving.engine.layers.convention import LayerClass, LayerError, source_digest
from serving.engine.layers.known import KNOWN
from serving.engine.layers.refused import REFUSED

_EXTEND = "To add one, read its forward and list it in serving/engine/layers/known.py, with a parity test."


def supported_architectures() -> tuple[str, ...]:
    """Model classes whose layers are known."""
    return tuple(sorted({name for known in KNOWN.values() for name in known.architectures}))


def require_architecture(architectures: list[str]) -> None:
    """Refuse a model early, before it is loaded.

    Raises:
        LayerError: none of its architectures is known, or one is known not to be readable.
    """
    for name in architectures:
        if name in REFUSED:
            raise LayerError(
                f"the model's architecture is {name}, which cannot be monitored: {REFUSED[name]}. Serve another model, "
                "or this one unmonitored."
            )
    if not set(architectures) & set(supported_architectures()):
        raise LayerError(
            f"the model's architecture is {', '.join(architectures) or 'not stated'}, whose residual stream nobody has "
            f"read. Known: {', '.join(supported_architectures())}. {_EXTEND}"
        )


@dataclass(frozen=True, slots=True)
class Stack:
    """The decoder layers that this worker holds.

    Attributes:
        layers: by number; those of other pipeline stages are missing.
        known: what their class is.
        final_norm: what takes the stream after the last layer; None where a later pipeline stage holds it.
    """

    layers: dict[int, nn.Module]
    known: LayerClass
    final_norm: nn.Module | None


def decoder_stack(model: nn.Module, num_layers: int) -> Stack:
    """The decoder layers of a model, all of them of one known class.

    Args:
        model: loaded; of a multimodal model the language model is taken.
        num_layers: decoder layers of the whole model.
    Raises:
        LayerError: no list of that length is where known classes have theirs, a layer's class is not listed, or its
            forward is not the one that was read.
    """
    get_language_model = getattr(model, "get_language_model", None)
    root = get_language_model() if get_language_model is not None else model
    paths = sorted({known.layers for known in KNOWN.values()})
    found = [
        module for path in paths if isinstance(module := _at(root, path), nn.ModuleList) and len(module) == num_layers
    ]
    if len(found) != 1:
        raise LayerError(
            f"{type(root).__name__}: one list of {num_layers} decoder layers was looked for at {', '.join(paths)}; "
            f"{len(found)} were found. {_EXTEND}"
        )
    layers = {number: layer for number, layer in enumerate(found[0]) if not _is_missing(layer)}
    classes = {layer_class(layer) for layer in layers.values()}
    if len(classes) != 1:
        raise LayerError(f"{type(root).__name__}: one class of decoder layers was expected, found {len(classes)}.")
    known = classes.pop()
    norm = _at(root, known.final_norm)
    if norm is None:
        raise LayerError(f"{type(root).__name__}: there is no final norm at {known.final_norm!r}. {_EXTEND}")
    last = num_layers - 1 in layers
    return Stack(layers, known, norm if last and not _is_missing(norm) else None)


def layer_class(layer: nn.Module) -> LayerClass:
    """What is known of a decoder layer's class.

    Raises:
        LayerError: its class is not listed, or its forward is not the one that was read.
    """
    cls = type(layer)
    name = f"{cls.__module__}.{cls.__qualname__}"
    known = KNOWN.get(name)
    if known is None:
        raise LayerError(f"decoder layer {name} is not known. Known: {', '.join(sorted(KNOWN))}. {_EXTEND}")
    # A forward that is bound to the instance hides that of the class (vLLM rewrites some modules of transformers so).
    found = source_digest(cls.forward) if "forward" not in vars(layer) else "of its own, bound to the instance"
    if found != known.forward_sha256:
        raise LayerError(
            f"decoder layer {name}: its forward has changed (source hash {found}, read was {known.forward_sha256}). "
            f"Install a vLLM version in the supported range. {_EXTEND}"
        )
    return known


def _at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _is_missing(module: nn.Module) -> bool:
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(module, PPMissingLayer)
