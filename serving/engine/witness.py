"""Witnesses of a forward pass: what modules were given and what they returned, kept beside the taps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class Call:
    """The newest call of a module: copies of the first tensor it was given, and of what it returned."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    given: torch.Tensor
    returned: Any


@contextmanager
def witnesses(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """Keep the newest call of each of these modules, by module, until the end of the block."""
    calls: dict[nn.Module, Call] = {}
    given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    # Copies, for fused norms write into their inputs.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[module] = _copied(args), {name: _copied(value) for name, value in kwargs.items()}

    def after(module: nn.Module, _args: object, _kwargs: object, output: Any) -> None:
        args, kwargs = given.pop(module)
        first = kwargs.get("hidden_states")
        if first is None:
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        calls[module] = Call((args, kwargs), first, _copied(output))

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def noisy_attention(layers: Iterable[nn.Module], generator: torch.Generator) -> Iterator[None]:
    """Let attention return noise: without a KV cache it returns zeros, or memory as it was found."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    found = [module for layer in layers for module in layer.modules() if isinstance(module, AttentionLayerBase)]

    def noise(module: nn.Module) -> Any:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = original(*args, **kwargs)
            return torch.randn(output.shape, generator=generator, dtype=torch.float32, device=output.device).to(
                output.dtype
            )

        return forward

    for module in found:
        module.forward = noise(module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    return value
