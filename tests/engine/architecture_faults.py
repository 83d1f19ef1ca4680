"""Things that are wrong with a loaded model or with the registry, and what the start-up check says of each.

Part of the program ``tests.engine.architecture_run``: each fault is injected into a fresh tap set, checked, and undone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from probes.bank import Bank
from probes.taps import Site
from serving.engine.layers import KNOWN, Convention, LayerClass, LayerError, source_digest
from serving.engine.selfcheck import check_taps
from serving.engine.taps import TapSet, install_taps

PASSED = "passed"
LLAMA = "vllm.model_executor.models.llama.LlamaDecoderLayer"


@dataclass(frozen=True)
class Loaded:
    """A model that vLLM has loaded in this process."""

    model: Any
    config: Any
    num_layers: int
    max_rows: int

    def tap(self, bank: Bank) -> TapSet:
        return install_taps(
            self.model, bank, num_layers=self.num_layers, max_rows=self.max_rows, device=torch.device("cpu")
        )

    def check(self, taps: TapSet) -> None:
        check_taps(self.model, taps, self.config, device=torch.device("cpu"))


def verdict(loaded: Loaded, bank: Bank) -> str:
    """What the check says; the taps are gone afterwards."""
    classes = {module: type(module) for module in loaded.model.modules()}
    try:
        loaded.check(loaded.tap(bank))
    except LayerError as error:
        return str(error)
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
            for name in ("weight", "bias", "out", "fired"):
                module._buffers.pop(f"telltale_{name}", None)
    return PASSED


@contextmanager
def registered(**changes: Any) -> Iterator[None]:
    """A registry whose entries say something else."""
    wrong = {name: dataclasses.replace(known, **changes) for name, known in KNOWN.items()}
    with patch("serving.engine.layers.stack.KNOWN", MappingProxyType(wrong)):
        yield


@contextmanager
def unreduced_mlp(loaded: Loaded) -> Iterator[None]:
    """As with a deferred all-reduce: a layer returns a part of its sum, and the next norm is given the whole."""
    first, second = loaded.model.model.layers[0], loaded.model.model.layers[1]
    handles = [
        first.mlp.register_forward_hook(lambda module, inputs, output: output * 0.5),
        second.input_layernorm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, *inputs[1:])),
    ]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def halved_attention(loaded: Loaded) -> Iterator[None]:
    """As Cohere under tensor parallelism: the modules return partial sums, and the layer does the all-reduce."""
    layer = loaded.model.model.layers[0]
    handles = [
        layer.self_attn.register_forward_hook(lambda module, inputs, output: output * 0.5),
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda module, inputs: (inputs[0] * 2, *inputs[1:])
        ),
    ]  # fmt: skip
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def split_rows(loaded: Loaded) -> Iterator[None]:
    """As sequence-parallel experts: a layer returns the rows of one rank, and the next one gathers all of them."""
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    rest: list[torch.Tensor] = []

    class Split(LlamaDecoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden, residual = LlamaDecoderLayer.forward(self, *args, **kwargs)
            rest[:] = hidden[4:], residual[4:]
            return hidden[:4], residual[:4]

    def gather(module: nn.Module, inputs: Any) -> Any:
        positions, hidden, residual = inputs
        return positions, torch.cat([hidden, rest[0]]), torch.cat([residual, rest[1]])

    Split.__qualname__ = "Split"
    layers = loaded.model.model.layers
    entry = LayerClass(Convention.FUSED, source_digest(Split.forward), ())
    known = {LLAMA: KNOWN[LLAMA], f"{__name__}.Split": entry}
    before = type(layers[0])
    with patch("serving.engine.layers.stack.KNOWN", MappingProxyType(known)):
        handles = [layer.register_forward_pre_hook(gather) for layer in layers[1:]]
        handles.append(loaded.model.model.norm.register_forward_pre_hook(
            lambda module, inputs: (torch.cat([inputs[0], rest[0]]), torch.cat([inputs[1], rest[1]]))
        ))  # fmt: skip
        for layer in layers:
            layer.__class__ = Split
        yield
    for layer in layers:
        layer.__class__ = before
    for handle in handles:
        handle.remove()


@contextmanager
def bypassed_norm(loaded: Loaded) -> Iterator[None]:
    """As a norm fused with an all-reduce: the module is there, and nobody calls it."""
    layer = loaded.model.model.layers[1]
    real = layer.input_layernorm

    class Quiet(nn.Module):
        def __call__(self, *args: Any) -> Any:
            return real.forward(*args)

    layer.input_layernorm = Quiet()
    yield
    layer.input_layernorm = real


@contextmanager
def bound_forward(loaded: Loaded) -> Iterator[None]:
    """A forward bound to one layer, which hides the one that was read."""
    layer = loaded.model.model.layers[1]
    layer.forward = type(layer).forward.__get__(layer)
    yield
    del layer.forward


@contextmanager
def stage(loaded: Loaded, *, first: int, end: int) -> Iterator[None]:
    """What pipeline parallelism leaves of a model on one stage: vLLM's own stand-ins for the other layers."""
    from vllm.model_executor.models.utils import PPMissingLayer

    inner = loaded.model.model
    layers, norm = list(inner.layers), inner.norm

    class Group:
        is_first_rank = first == 0
        is_last_rank = end == len(layers)

    for number in range(len(layers)):
        if not first <= number < end:
            inner.layers[number] = PPMissingLayer()
    inner.norm = norm if Group.is_last_rank else PPMissingLayer()
    inner.start_layer, inner.end_layer = first, end
    with ExitStack() as scope:
        for place in ("vllm.distributed.get_pp_group", f"{type(inner).__module__}.get_pp_group"):
            scope.enter_context(patch(place, Group))
        yield
    inner.start_layer, inner.end_layer, inner.norm = 0, len(layers), norm
    for number, layer in enumerate(layers):
        inner.layers[number] = layer


def faults(architecture: str, loaded: Loaded, bank_of: Callable[..., Bank]) -> dict[str, str]:
    """The verdict on each fault that is tried on an architecture, and on the same model without it."""
    layers = range(loaded.num_layers)
    stream = bank_of(layers, sites=[Site.RESID_POST])
    attention, mlp = bank_of(layers, sites=[Site.ATTN_OUT]), bank_of(layers, sites=[Site.MLP_OUT])
    tried: dict[str, tuple[Bank, Callable[[], Any]]] = {}
    if architecture == "LlamaForCausalLM":
        tried = {
            "stream without its residual": (stream, lambda: registered(convention=Convention.STALE)),
            "partial sums": (stream, lambda: unreduced_mlp(loaded)),
            "partial attention": (attention, lambda: halved_attention(loaded)),
            "split rows": (stream, lambda: split_rows(loaded)),
            "norm that is never called": (stream, lambda: bypassed_norm(loaded)),
            "bound forward": (stream, lambda: bound_forward(loaded)),
            "last layer of a stage": (bank_of([1], sites=[Site.RESID_POST]), lambda: wrong_stage(loaded)),
        }
    elif architecture == "CohereForCausalLM":
        tried = {"doubled residual": (stream, lambda: registered(convention=Convention.FUSED))}
    elif architecture == "GraniteForCausalLM":
        tried = {
            "wrong shape": (stream, lambda: registered(convention=Convention.ALONE)),
            "forgotten multiplier": (mlp, lambda: registered(multiplier=None)),
        }
    elif architecture == "Gemma2ForCausalLM":
        tried = {"forgotten norm": (attention, lambda: registered(attention_norm=None))}
    found = {}
    for name, (bank, inject) in tried.items():
        with inject():
            found[name] = verdict(loaded, bank)
        found[f"after {name}"] = verdict(loaded, bank)
    return found


@contextmanager
def wrong_stage(loaded: Loaded) -> Iterator[None]:
    """A wrong convention where only the last layer of a pipeline stage is tapped: nothing here takes its stream."""
    with stage(loaded, first=0, end=2), registered(convention=Convention.STALE):
        yield


def stages(loaded: Loaded, bank: Bank) -> dict[str, Any]:
    """What the taps of each of two pipeline stages are, and what they collect."""
    found: dict[str, Any] = {}
    for first, end in ((0, 2), (2, 3)):
        with stage(loaded, first=first, end=end):
            name = f"{first}-{end}"
            found[f"{name} verdict"] = verdict(loaded, bank)
            classes = {module: type(module) for module in loaded.model.modules()}
            taps = loaded.tap(bank)
            for tap in taps.taps:
                taps.module(tap).get_buffer("telltale_out").fill_(1.0)
            found |= {
                f"{name} taps": [str(tap) for tap in taps.taps],
                f"{name} absent": [str(tap) for tap in taps.absent],
                f"{name} columns": [[columns.start, columns.stop] for columns in taps.present_columns],
                f"{name} row": taps.collect(2)[1].tolist(),
            }
            for module, cls in classes.items():
                module.__class__ = cls
    return found
