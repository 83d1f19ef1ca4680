"""Reads a site of a model's decoder layers with transformers, in float32: what a detector is fitted on.

It is the independent reference for what the serving engine reads, and knows no engine.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from probes.aggregate import Aggregator
from probes.card import Format, ModelRef
from probes.errors import TelltaleError
from probes.fit.example import Example
from probes.fit.weights import score_weights
from probes.taps import Site

__all__ = ["ActivationError", "ActivationReader", "Activations", "decoder_layers", "tokens_of"]

_TOKENS_PER_BATCH = 1536
_SINK_POSITIONS = 4
_SINK_FACTOR = 10.0
_MIN_SHARED_PREFIX = 4
_MODULES = {
    Site.ATTN_OUT: ("self_attn", "attn", "attention"),
    Site.MLP_OUT: ("mlp", "block_sparse_moe", "feed_forward"),
}
"""What transformers' decoder layers call the module whose output a site is; a layer has one of these names."""

Float32 = npt.NDArray[np.float32]


class ActivationError(TelltaleError, ValueError):
    """A model's residual stream cannot be read here."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Weighted means over the tokens of each request, with the weights that an aggregate gives their scores.

    Attributes:
        layers: decoder layers, first axis of ``means``.
        aggregates: linear in the scores, second axis.
        means: (layers, aggregates, requests, d_model) float32.
        defined: (aggregates, requests), whether the aggregate has a value for a request of this length.
    """

    layers: tuple[int, ...]
    aggregates: tuple[Aggregator, ...]
    means: Float32
    defined: npt.NDArray[np.bool_]

    def at(self, layer: int, aggregate: Aggregator) -> Float32:
        """(requests, d_model)."""
        view: Float32 = self.means[self.layers.index(layer), self.aggregates.index(aggregate)]
        return view

    def is_defined(self, aggregate: Aggregator) -> npt.NDArray[np.bool_]:
        """(requests,)."""
        mask: npt.NDArray[np.bool_] = self.defined[self.aggregates.index(aggregate)]
        return mask


class ActivationReader:
    """A model, read at one site of several decoder layers.

    Args:
        model_dir: folder in transformers' layout.
        model: which model that is.
        layers: to read, 0 = after the first decoder layer.
        site: where in them.
        cache_dir: where features are kept between runs.
        progress: told how far it is.
    Raises:
        ActivationError: a layer does not exist, or the architecture's layers or their modules are not found.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        model: ModelRef,
        layers: Sequence[int],
        cache_dir: Path,
        progress: Callable[[str], None],
        site: Site = Site.RESID_POST,
    ) -> None:
        if beyond := [layer for layer in layers if not 0 <= layer < model.num_layers]:
            raise ActivationError(
                f"layers {beyond}: the model's layers are 0 to {model.num_layers - 1}. Correct 'layers' in the recipe."
            )
        self.model = model
        self.layers = tuple(layers)
        self.site = site
        self._cache_dir = cache_dir
        self._progress = progress
        self._model_dir = model_dir
        self._network: torch.nn.Module | None = None
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)

    def tokens(self, example: Example, text_format: Format) -> list[int]:
        """As the server sees the request: through the chat template with the generation prompt, or as it is."""
        return tokens_of(self._tokenizer, example, text_format)

    def stream(self, tokens: Sequence[int]) -> Mapping[int, Float32]:
        """The residual stream of one prompt after each of the layers: (len(tokens), d_model) each."""
        with self._capture() as captured:
            self._forward(torch.tensor([list(tokens)]))
            return {layer: captured[layer][0].numpy() for layer in self.layers}

    def sink_positions(self, examples: Sequence[Example], text_format: Format) -> int:
        """How many leading positions have a norm far above the rest, at any of the layers.

        A position counts when its median norm is ten times the median norm of all positions behind the fourth.
        """
        rows = [row for example in examples if len(row := self.tokens(example, text_format)) > _SINK_POSITIONS]
        if not rows:
            return 1
        leading, rest = [], []
        with self._capture() as captured:
            for row in rows:
                self._forward(torch.tensor([row]))
                norms = torch.stack([captured[layer][0].norm(dim=-1) for layer in self.layers])
                leading.append(norms[:, :_SINK_POSITIONS])
                rest.append(norms[:, _SINK_POSITIONS:])
        typical = torch.cat(rest, dim=1).median(dim=1).values
        high = torch.stack(leading).median(dim=0).values > _SINK_FACTOR * typical[:, None]
        positions = [position + 1 for position in range(_SINK_POSITIONS) if bool(high[:, position].any())]
        return max(positions, default=0)

    def read(
        self,
        examples: Sequence[Example],
        *,
        text_format: Format,
        aggregates: Sequence[Aggregator],
        skip_first: int,
        label: str,
    ) -> Activations:
        """Weighted means over the tokens of every example, from the cache if they were read before."""
        key = self._key(examples, text_format, aggregates, skip_first)
        path = self._cache_dir / "features" / f"{key}.safetensors"
        if path.is_file():
            stored = load_file(str(path))
            return Activations(self.layers, tuple(aggregates), stored["means"], stored["defined"].astype(np.bool_))
        found = self._read(examples, text_format, aggregates, skip_first, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"means": found.means, "defined": found.defined.astype(np.uint8)}, str(partial))
        partial.replace(path)
        return found

    def _read(
        self,
        examples: Sequence[Example],
        text_format: Format,
        aggregates: Sequence[Aggregator],
        skip_first: int,
        label: str,
    ) -> Activations:
        rows = [self.tokens(example, text_format) for example in examples]
        shared = _shared_prefix(rows)
        shared = shared if shared >= _MIN_SHARED_PREFIX else 0
        means = np.empty((len(self.layers), len(aggregates), len(rows), self.model.d_model), dtype=np.float32)
        defined = np.empty((len(aggregates), len(rows)), dtype=np.bool_)
        done = 0
        with self._capture() as captured:
            cache, head = None, torch.empty((len(self.layers), 0, self.model.d_model))
            if shared:
                cache = self._forward(torch.tensor([rows[0][:shared]]), use_cache=True)
                head = torch.stack([captured[layer][0] for layer in self.layers])
            for batch in _batches([len(row) - shared for row in rows]):
                tails = [rows[i][shared:] for i in batch]
                self._forward_padded(tails, cache, shared)
                stream = torch.stack([captured[layer] for layer in self.layers])
                for place, i in enumerate(batch):
                    whole = torch.cat([head, stream[:, place, : len(tails[place])]], dim=1)
                    scored = whole[:, min(skip_first, whole.shape[1] - 1) :].numpy()
                    weights = score_weights(tuple(aggregates), scored.shape[1])
                    means[:, :, i] = np.matmul(weights.values, scored.astype(np.float64))
                    defined[:, i] = weights.defined & (whole.shape[1] > skip_first)
                done += len(batch)
                self._progress(f"{label}: {done} of {len(rows)} requests read ({text_format.value})")
        return Activations(self.layers, tuple(aggregates), means, defined)

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
        output = self._loaded()(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
        )
        return output.past_key_values

    def _loaded(self) -> torch.nn.Module:
        if self._network is None:
            network = AutoModel.from_pretrained(str(self._model_dir), dtype=torch.float32, local_files_only=True)
            network.eval()
            # What lies above the highest layer that is read would be computed for nothing.
            del decoder_layers(network, self.model.num_layers)[max(self.layers) + 1 :]
            self._network = network
        return self._network

    @contextmanager
    def _capture(self) -> Iterator[Mapping[int, torch.Tensor]]:
        """The site of each layer in the newest forward pass; the residual stream is the layer's output, not normed."""
        blocks = decoder_layers(self._loaded(), max(self.layers) + 1)
        captured: dict[int, torch.Tensor] = {}

        def remember(layer: int) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, _inputs: object, output: object) -> None:
                value = output[0] if isinstance(output, tuple) else output
                if not isinstance(value, torch.Tensor):
                    raise ActivationError(
                        f"layer {layer} returns a {type(value).__name__}, not a tensor. "
                        f"Only modules that return their {self.site.value} can be read."
                    )
                captured[layer] = value.float()

            return hook

        modules = {layer: _module_of(blocks[layer], self.site) for layer in self.layers}
        handles = [module.register_forward_hook(remember(layer)) for layer, module in modules.items()]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _key(
        self, examples: Sequence[Example], text_format: Format, aggregates: Sequence[Aggregator], skip_first: int
    ) -> str:
        parts = {
            "model": self.model.model_dump(exclude={"id"}),
            "format": text_format.value,
            "layers": self.layers,
            "site": self.site.value,
            "aggregates": [aggregate.config() for aggregate in aggregates],
            "skip_first": skip_first,
            "messages": [example.messages for example in examples],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokens_of(tokenizer: Any, example: Example, text_format: Format) -> list[int]:
    """As the server sees the request: through the chat template with the generation prompt, or as it is.

    Args:
        tokenizer: transformers'.
        example: text, or turns.
        text_format: which of the two.
    """
    if text_format is Format.RAW:
        return list(tokenizer(example.text)["input_ids"])
    rendered = tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


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


def _module_of(layer: torch.nn.Module, site: Site) -> torch.nn.Module:
    if site is Site.RESID_POST:
        return layer
    found = [module for name in _MODULES[site] if isinstance(module := getattr(layer, name, None), torch.nn.Module)]
    if len(found) != 1:
        raise ActivationError(
            f"{type(layer).__name__} has no module that is surely its {site.value}: one of {_MODULES[site]} was looked "
            f"for, {len(found)} were found. Read {Site.RESID_POST.value} instead."
        )
    return found[0]


def _shared_prefix(rows: Sequence[list[int]]) -> int:
    if not rows:
        return 0
    low, high = min(rows), max(rows)
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
