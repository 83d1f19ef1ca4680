"""A model of transformers in float32, whose sites are read while it runs; knows no detector and no example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from probes.errors import TelltaleError
from probes.taps import Site, Tap

__all__ = ["ActivationError", "TappedNetwork", "decoder_layers", "site_module"]

_TOKENS_PER_BATCH = 1536
_MIN_SHARED_PREFIX = 4
_MODULES = {
    Site.ATTN_OUT: ("self_attn", "attn", "attention"),
    Site.MLP_OUT: ("mlp", "block_sparse_moe", "feed_forward"),
}
"""What transformers' decoder layers call the module whose output a site is; a layer has one of these names."""


class ActivationError(TelltaleError, ValueError):
    """A model's activations cannot be read here."""


class TappedNetwork:
    """The decoder layers of a model, loaded when they are first needed.

    Args:
        model_dir: folder in transformers' layout.
        num_layers: decoder layers of the model.
        depth: how many of them are computed; what lies above would be computed for nothing.
    """

    def __init__(self, model_dir: Path, *, num_layers: int, depth: int) -> None:
        self._model_dir = model_dir
        self._num_layers = num_layers
        self._depth = depth
        self._network: torch.nn.Module | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The model itself.

        Raises:
            ActivationError: its decoder layers are not found.
        """
        if self._network is None:
            network = AutoModel.from_pretrained(str(self._model_dir), dtype=torch.float32, local_files_only=True)
            network.eval()
            del decoder_layers(network, self._num_layers)[self._depth :]
            self._network = network
        return self._network

    def read(self, row: Sequence[int], taps: Sequence[Tap]) -> Mapping[Tap, torch.Tensor]:
        """One request's activations: (len(row), d_model) float32 at each tap."""
        with self._capture(taps) as captured:
            self._forward(torch.tensor([list(row)]))
            return {tap: captured[tap][0] for tap in taps}

    def sweep(
        self, rows: Sequence[Sequence[int]], taps: Sequence[Tap]
    ) -> Iterator[tuple[int, Mapping[Tap, torch.Tensor]]]:
        """Activations of many requests, one request at a time, long ones first.

        They are computed in batches; the activations of one batch are all that is kept. A beginning that all requests
        share, such as a template's system prompt, is computed once.

        Args:
            rows: token ids, none empty.
            taps: what to read, below ``depth``.
        Yields: number of the request, and (its tokens, d_model) float32 at each tap.

        Raises:
            ActivationError: a tap's module is not found, or does not return a tensor.
        """
        shared = _shared_prefix(rows)
        shared = shared if shared >= _MIN_SHARED_PREFIX else 0
        with self._capture(taps) as captured:
            cache, head = None, dict.fromkeys(taps, torch.empty(0))
            if shared:
                cache = self._forward(torch.tensor([list(rows[0][:shared])]), use_cache=True)
                head = {tap: captured[tap][0] for tap in taps}
            for batch in _batches([len(row) - shared for row in rows]):
                tails = [rows[i][shared:] for i in batch]
                self._forward_padded(tails, cache, shared)
                for place, i in enumerate(batch):
                    own = {tap: captured[tap][place, : len(tails[place])] for tap in taps}
                    yield i, {tap: torch.cat([head[tap], own[tap]]) if shared else own[tap] for tap in taps}

    def _forward_padded(self, rows: Sequence[Sequence[int]], cache: Any, shared: int) -> None:
        longest = max(len(row) for row in rows)
        tokens = torch.zeros((len(rows), longest), dtype=torch.long)
        mask = torch.zeros((len(rows), shared + longest), dtype=torch.long)
        mask[:, :shared] = 1
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row)
            mask[place, shared : shared + len(row)] = 1
        own = None
        if cache is not None:
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(rows))
        self._forward(tokens, attention_mask=mask, cache=own, start=shared)

    @torch.inference_mode()
    def _forward(
        self,
        tokens: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        start: int = 0,
        use_cache: bool = False,
    ) -> Any:
        positions = torch.arange(start, start + tokens.shape[1])[None].expand(tokens.shape[0], -1)
        output = self.module(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
        )
        return output.past_key_values

    @contextmanager
    def _capture(self, taps: Sequence[Tap]) -> Iterator[Mapping[Tap, torch.Tensor]]:
        """Each tap in the newest forward pass; the residual stream is the layer's output, not normed."""
        blocks = decoder_layers(self.module, self._depth)
        captured: dict[Tap, torch.Tensor] = {}

        def remember(tap: Tap) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, _inputs: object, output: object) -> None:
                value = output[0] if isinstance(output, tuple) else output
                if not isinstance(value, torch.Tensor):
                    raise ActivationError(
                        f"layer {tap.layer} returns a {type(value).__name__}, not a tensor. "
                        f"Only modules that return their {tap.site.value} can be read."
                    )
                captured[tap] = value.float()

            return hook

        modules = {tap: site_module(blocks[tap.layer], tap.site) for tap in taps}
        handles = [module.register_forward_hook(remember(tap)) for tap, module in modules.items()]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


def decoder_layers(network: torch.nn.Module, count: int) -> torch.nn.ModuleList:
    """The list of a model's decoder layers.

    Args:
        network: of transformers.
        count: how many there are.
    Raises:
        ActivationError: there is no list of that length with a name that such lists have.
    """
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and name.split(".")[-1] in {"layers", "h"}:
            return module
    raise ActivationError(
        f"{type(network).__name__}: no list of {count} decoder layers named 'layers' or 'h' was found. "
        "Only decoder-only models in transformers' layout can be read."
    )


def site_module(layer: torch.nn.Module, site: Site) -> torch.nn.Module:
    """The module of a decoder layer whose output is a site.

    Raises:
        ActivationError: it is not surely known which one that is.
    """
    if site is Site.RESID_POST:
        return layer
    found = [module for name in _MODULES[site] if isinstance(module := getattr(layer, name, None), torch.nn.Module)]
    if len(found) != 1:
        raise ActivationError(
            f"{type(layer).__name__} has no module that is surely its {site.value}: one of {_MODULES[site]} was looked "
            f"for, {len(found)} were found. Read {Site.RESID_POST.value} instead."
        )
    return found[0]


def _shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    if not rows:
        return 0
    low, high = list(min(rows, key=list)), list(max(rows, key=list))
    shared = 0
    while shared < min(len(low), len(high)) - 1 and low[shared] == high[shared]:
        shared += 1
    return min(shared, min(len(row) for row in rows) - 1)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
