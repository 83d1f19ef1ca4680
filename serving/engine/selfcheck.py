"""A numeric check at start-up: what each tap reads is what the next layer really takes as its residual stream.

The registry of layers says where the stream is; this is the proof, on the loaded model and on every worker. A few
random tokens go through the model without compilation, and beside the taps stand witnesses that know no convention:
they keep what each norm was given and what it normalised. A convention that adds a stale residual, partial sums of
tensor parallelism and rows split over ranks all show as a difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from probes.taps import Site, Tap
from serving.engine.layers import LayerError
from serving.engine.runtime import load_worker_plan
from serving.engine.taps import TapSet, install_taps, output_of, rows_of
from serving.engine.witness import Call, noisy_attention, witnesses

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TOKENS = 7
"""At most. Odd on purpose: tokens that are split over ranks cannot come out even."""
_SEED = 20260101
_TOLERANCE = 1e-4
_SAME_NORM = 0.05
_SUM_TOLERANCE = 1e-2
_EXTEND = "Its entry in serving/engine/layers/known.py does not fit this model as vLLM runs it here: correct the entry"


def tap_model(model: nn.Module, vllm_config: VllmConfig, *, max_rows: int, device: torch.device) -> TapSet:
    """Tap a model as its engine's plan says, and check the taps.

    Args:
        model: loaded, before its first forward, as the runner holds it without its wrappers.
        vllm_config: of the engine.
        max_rows: the most rows of one step.
        device: of the model.
    Raises:
        LayerError: the layers are not known, or a tap reads something else than it should.
    """
    plan = load_worker_plan(vllm_config)
    taps = install_taps(model, plan.bank, num_layers=plan.num_layers, max_rows=max_rows, device=device)
    check_taps(model, taps, vllm_config, device=device)
    return taps


@torch.inference_mode()
def check_taps(model: nn.Module, taps: TapSet, vllm_config: VllmConfig, *, device: torch.device) -> None:
    """Run a few random tokens through a tapped model, and compare what was read with what was used.

    Afterwards the taps have fired zero times and hold no row. Under tensor or pipeline parallelism every worker calls
    it at the same point of its start.

    Args:
        model: loaded and tapped, as the runner holds it without its wrappers.
        taps: of this worker.
        vllm_config: of the engine.
        device: of the model.
    Raises:
        LayerError: a tap reads something else; names tap, layer class and convention.
    """
    if not taps.taps:
        return
    layers = taps.stack.layers
    watched: list[nn.Module] = [] if taps.stack.final_norm is None else [taps.stack.final_norm]
    for layer in layers.values():
        watched += [layer, *(_part(layer, name) for name in _parts(taps))]
    generator = torch.Generator(device=device).manual_seed(_SEED)
    taps.clear()
    with ExitStack() as scope:
        calls = scope.enter_context(witnesses(watched))
        scope.enter_context(noisy_attention(layers.values(), generator))
        count = min(TOKENS, _buffer(taps, taps.taps[0], "out").shape[0])
        scope.enter_context(_eager(vllm_config, count))
        _forward(model, vllm_config, count, generator, device)
        readouts = {tap: _buffer(taps, tap, "out")[:count].clone() for tap in taps.taps}
        streams = _streams(taps, calls)
        check = _Check(taps, calls, streams, _tolerance(vllm_config))
        for tap in taps.taps:
            check.require(tap, readouts[tap])
    taps.clear()


class _Check:
    def __init__(
        self,
        taps: TapSet,
        calls: dict[nn.Module, Call],
        streams: dict[int, tuple[torch.Tensor, str]],
        tolerance: float,
    ) -> None:
        self._taps, self._calls, self._streams, self._tolerance = taps, calls, streams, tolerance

    def require(self, tap: Tap, readout: torch.Tensor) -> None:
        """Compare one tap's rows with what its layer's surroundings took."""
        if tap.site is Site.RESID_POST:
            used, user = self._streams[tap.layer + 1]
        else:
            used, user = self._site_output(tap), "the layer itself"
        if used.shape[0] != len(readout) or not bool(readout.isfinite().all()):
            rows = int(readout.isfinite().all(dim=1).sum())
            raise self._error(
                tap,
                f"of {len(readout)} tokens it read {rows} and {user} took {used.shape[0]}: the rows are split over "
                "ranks, or not finite",
            )
        difference = self._difference(tap, readout, used.float())
        if not difference <= self._tolerance:  # a NaN is not within it either
            raise self._error(
                tap,
                f"what it reads is not what {user} takes (they differ by {difference:.1%} of the stream's size, "
                f"{self._tolerance:.2%} is allowed)",
            )

    def _difference(self, tap: Tap, readout: torch.Tensor, used: torch.Tensor) -> float:
        weight, bias = _buffer(self._taps, tap, "weight"), _buffer(self._taps, tap, "bias")
        norms = used.norm(dim=1, keepdim=True)
        # A bias of any size costs its own rounding, which says nothing about the stream.
        size = norms * weight.norm(dim=0) + 1e-2 * bias.abs() + 1e-20
        products = (readout[:, :-1] - (used @ weight + bias)).abs() / size
        # A norm that is off by a small share is off by twice that share when squared.
        squares = (readout[:, -1:] - norms.square()).abs() / (2 * norms.square() + 1e-20)
        return float(torch.cat([products, squares], dim=1).max())

    def _site_output(self, tap: Tap) -> torch.Tensor:
        """What attention or MLP returned, once it is certain that both together are what the layer adds."""
        known, layer = self._taps.stack.known, self._taps.stack.layers[tap.layer]
        before, after = self._streams[tap.layer][0].float(), self._streams[tap.layer + 1][0].float()
        outputs = {
            Site.ATTN_OUT: self._output(_part(layer, known.attention)),
            Site.MLP_OUT: self._output(_part(layer, known.mlp)),
        }
        added = torch.zeros_like(after)
        for site, norm in ((Site.ATTN_OUT, known.attention_norm), (Site.MLP_OUT, known.mlp_norm)):
            value = outputs[site]
            if value.shape != after.shape:
                raise self._error(tap, f"{site.value} has the shape {tuple(value.shape)}, the stream {after.shape}")
            if norm is not None:
                value = _first(_part(layer, norm).forward(value.clone()))
            added += value.float() * (1.0 if known.multiplier is None else known.multiplier(layer))
        rounding = torch.finfo(self._streams[tap.layer][0].dtype).eps * float(before.norm() + after.norm())
        error = float((after - before - added).norm())
        if not error <= _SUM_TOLERANCE * float(added.norm()) + 2 * rounding:
            raise self._error(
                tap,
                "attention and MLP do not sum up to what the layer adds to the stream "
                f"({error / float(added.norm()):.1%} is missing): an output is a partial sum, as under tensor "
                "parallelism before the all-reduce, or a norm or multiplier in between is not listed",
            )
        return outputs[tap.site]

    def _output(self, module: nn.Module) -> torch.Tensor:
        return rows_of(output_of(self._calls[module].returned)[0])

    def _error(self, tap: Tap, what: str) -> LayerError:
        layer = self._taps.stack.layers[tap.layer]
        known = self._taps.stack.known
        name = type(layer).__name__.removeprefix("Tapped")
        return LayerError(
            f"the tap {tap} cannot be trusted: {what}. Layer class {name}, convention {known.convention.value!r}. "
            f"{_EXTEND}, or serve the model without this detector."
        )


def _streams(taps: TapSet, calls: dict[nn.Module, Call]) -> dict[int, tuple[torch.Tensor, str]]:
    """By layer number, the stream that goes into it, with the name of what took it; one entry beyond the last layer."""
    stack = taps.stack
    found = {number: (_taken(_part(layer, stack.known.first), calls), f"layer {number}") for number, layer in
             stack.layers.items()}  # fmt: skip
    last = max(stack.layers)
    if stack.final_norm is not None:
        found[last + 1] = _taken(stack.final_norm, calls), "the final norm"
    else:
        # The next layer is on another pipeline stage: a layer of the same class takes what this one returned.
        found[last + 1] = _succeed_itself(taps, last, calls), f"a layer behind layer {last}"
    return found


def _succeed_itself(taps: TapSet, number: int, calls: dict[nn.Module, Call]) -> torch.Tensor:
    layer, known = taps.stack.layers[number], taps.stack.known
    kept = dict(calls)
    call = calls[layer]
    output = call.returned
    bound = inspect.signature(type(layer).forward).bind(layer, *call.arguments[0], **call.arguments[1])
    bound.arguments["hidden_states"] = _first(output).clone()
    if "residual" in bound.arguments:
        bound.arguments["residual"] = output[1].clone()
    layer(*bound.args[1:], **bound.kwargs)
    stream = _taken(_part(layer, known.first), calls)
    calls.update(kept)
    return stream


def _taken(module: nn.Module, calls: dict[nn.Module, Call]) -> torch.Tensor:
    """The residual stream as a module took it: a norm's input, or the sum that a fused norm computed."""
    call = calls.get(module)
    if call is None:
        raise LayerError(
            f"{type(module).__name__}, which should take the residual stream, was never called: the stream goes "
            f"another way, such as a norm fused with an all-reduce. {_EXTEND}."
        )
    returned = call.returned
    if not (isinstance(returned, tuple) and len(returned) > 1 and isinstance(returned[1], torch.Tensor)):
        return rows_of(call.given)
    # Given two tensors, a norm takes their sum, or the first alone: what it returned shows which.
    normed = returned[0].float()
    for candidate in (returned[1], call.given):
        again = _first(module.forward(candidate.clone())).float()
        if again.shape == normed.shape and float((again - normed).norm()) <= _SAME_NORM * float(normed.norm()):
            return rows_of(candidate)
    raise LayerError(
        f"{type(module).__name__}, which should take the residual stream, normalises neither its input nor the sum "
        f"that it returns. {_EXTEND}."
    )


@contextmanager
def _eager(vllm_config: VllmConfig, count: int) -> Iterator[None]:
    from vllm.forward_context import set_forward_context

    with set_forward_context(None, vllm_config, num_tokens=count, skip_compiled=True):
        yield


def _forward(model: Any, vllm_config: VllmConfig, count: int, generator: torch.Generator, device: torch.device) -> None:
    from vllm.distributed import get_pp_group

    config = vllm_config.model_config
    tokens = torch.randint(config.get_vocab_size(), (count,), generator=generator, device=device)
    intermediate = None
    if not get_pp_group().is_first_rank:
        intermediate = model.make_empty_intermediate_tensors(batch_size=count, dtype=config.dtype, device=device)
        for value in intermediate.tensors.values():
            value.copy_(torch.randn(value.shape, generator=generator, device=device))
    model(
        input_ids=tokens,
        positions=torch.arange(count, device=device),
        intermediate_tensors=intermediate,
        inputs_embeds=None,
    )


def _tolerance(vllm_config: VllmConfig) -> float:
    return max(_TOLERANCE, float(torch.finfo(vllm_config.model_config.dtype).eps))


def _parts(taps: TapSet) -> set[str]:
    known = taps.stack.known
    return {known.first, known.attention, known.mlp}


def _part(layer: nn.Module, name: str) -> nn.Module:
    module = getattr(layer, name, None)
    if isinstance(module, nn.Module):
        return module
    raise LayerError(f"{type(layer).__name__} has no module {name!r}, which its entry names. {_EXTEND}.")


def _first(output: Any) -> torch.Tensor:
    return output_of(output)[0]


def _buffer(taps: TapSet, tap: Tap, name: str) -> torch.Tensor:
    return taps.module(tap).get_buffer(f"telltale_{name}")
