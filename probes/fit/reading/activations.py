"""Reads a model's decoder layers with transformers, in float32: what a detector is fitted on.

It is the independent reference for what the serving engine reads, and knows no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from probes.aggregate import Aggregator
from probes.card import Format, ModelRef, Stage
from probes.fit.reading.network import ActivationError, TappedNetwork
from probes.fit.reading.rendered import Rendered, prompt_tokens, render
from probes.fit.reading.weights import score_weights
from probes.fit.rows.example import Example
from probes.speaker import Speaker
from probes.taps import Site, Tap

__all__ = ["ActivationError", "ActivationReader", "Activations"]

_SINK_POSITIONS = 4
_SINK_FACTOR = 10.0
_REPORTED = 100
"""Progress is told after so many requests."""

Float32 = npt.NDArray[np.float32]


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

    def side_by_side(self, layers: Sequence[int], aggregate: Aggregator) -> Float32:
        """(requests, layers * d_model)."""
        return np.concatenate([self.at(layer, aggregate) for layer in layers], axis=1)

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
        self._taps = tuple(Tap(layer, site) for layer in layers)
        self._cache_dir = cache_dir
        self._progress = progress
        self._network = TappedNetwork(model_dir, num_layers=model.num_layers, depth=max(layers) + 1)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)

    def tokens(self, example: Example, text_format: Format) -> list[int]:
        """The prompt as the server sees it: through the chat template with the generation prompt, or as it is."""
        return prompt_tokens(self._tokenizer, example, text_format)

    def render(
        self,
        examples: Sequence[Example],
        *,
        text_format: Format,
        stage: Stage,
        segments: Collection[Speaker] = (),
    ) -> list[Rendered]:
        """What the server reads of each example at a stage; see ``probes.fit.reading.rendered.render``."""
        return [
            render(self._tokenizer, example, text_format=text_format, stage=stage, segments=segments)
            for example in examples
        ]

    def stream(self, tokens: Sequence[int]) -> Mapping[int, Float32]:
        """The site of one prompt after each of the layers: (len(tokens), d_model) each."""
        found = self._network.read(tokens, self._taps)
        return {tap.layer: found[tap].numpy() for tap in self._taps}

    def sweep(
        self, requests: Sequence[Rendered], taps: Sequence[Tap], *, label: str
    ) -> Iterator[tuple[int, Mapping[Tap, Float32]]]:
        """Activations of many requests at any taps up to the highest layer, one request at a time.

        Args:
            requests: what to read.
            taps: where.
            label: what the requests are, for progress.
        Yields: number of the request, and (its tokens, d_model) at each tap.

        Raises:
            ActivationError: a tap lies above the highest layer, or cannot be read.
        """
        if beyond := [str(tap) for tap in taps if tap.layer > max(self.layers)]:
            raise ActivationError(
                f"taps {beyond}: this reader computes layers up to {max(self.layers)}. Open one for these layers."
            )
        rows = [request.tokens for request in requests]
        for done, (i, found) in enumerate(self._network.sweep(rows, taps), 1):
            yield i, {tap: values.numpy() for tap, values in found.items()}
            if done % _REPORTED == 0 or done == len(rows):
                self._progress(f"{label}: {done} of {len(rows)} requests read")

    def sink_positions(self, examples: Sequence[Example], text_format: Format) -> int:
        """How many leading positions have a norm far above the rest, at any of the layers.

        A position counts when its median norm is ten times the median norm of all positions behind the fourth.
        """
        rows = [row for example in examples if len(row := self.tokens(example, text_format)) > _SINK_POSITIONS]
        if not rows:
            return 1
        leading, rest = [], []
        for row in rows:
            found = self._network.read(row, self._taps)
            norms = torch.stack([found[tap].norm(dim=-1) for tap in self._taps])
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
        stage: Stage = Stage.PROMPT,
    ) -> Activations:
        """Weighted means over what is read of every example, from the cache if they were read before.

        Args:
            examples: to read.
            text_format: how their texts reach the model.
            aggregates: linear in the scores.
            skip_first: leading positions that are never scored.
            label: what the examples are, for progress.
            stage: what is read of them; at ``stream`` the means are those behind the newest token, not a maximum.
        Raises:
            probes.fit.reading.rendered.RenderError: an example has nothing to read at the stage.
        """
        key = self._key(examples, text_format, aggregates, skip_first, stage)
        path = self._cache_dir / "features" / f"{key}.safetensors"
        if path.is_file():
            stored = load_file(str(path))
            return Activations(self.layers, tuple(aggregates), stored["means"], stored["defined"].astype(np.bool_))
        requests = self.render(examples, text_format=text_format, stage=stage)
        found = self._read(requests, aggregates, skip_first, f"{label} ({text_format.value})")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"means": found.means, "defined": found.defined.astype(np.uint8)}, str(partial))
        partial.replace(path)
        return found

    def _read(
        self,
        requests: Sequence[Rendered],
        aggregates: Sequence[Aggregator],
        skip_first: int,
        label: str,
    ) -> Activations:
        means = np.empty((len(self.layers), len(aggregates), len(requests), self.model.d_model), dtype=np.float32)
        defined = np.empty((len(aggregates), len(requests)), dtype=np.bool_)
        for i, found in self.sweep(requests, self._taps, label=label):
            whole = np.stack([found[tap] for tap in self._taps])
            length = whole.shape[1]
            start = max(skip_first, requests[i].first)
            scored = whole[:, min(start, length - 1) :]
            weights = score_weights(tuple(aggregates), scored.shape[1])
            means[:, :, i] = np.matmul(weights.values, scored.astype(np.float64))
            defined[:, i] = weights.defined & (length > start)
        return Activations(self.layers, tuple(aggregates), means, defined)

    def _key(
        self,
        examples: Sequence[Example],
        text_format: Format,
        aggregates: Sequence[Aggregator],
        skip_first: int,
        stage: Stage,
    ) -> str:
        parts: dict[str, Any] = {
            "model": self.model.model_dump(exclude={"id"}),
            "format": text_format.value,
            "layers": self.layers,
            "site": self.site.value,
            "aggregates": [aggregate.config() for aggregate in aggregates],
            "skip_first": skip_first,
            "messages": [example.messages for example in examples],
        }
        if stage is not Stage.PROMPT:
            parts |= {"stage": stage.value, "responses": [example.response for example in examples]}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
