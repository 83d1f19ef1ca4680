"""What a model predicts when one of its sites is replaced: the cross entropy that a reconstruction keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from probes.card import ModelRef
from probes.fit.reading.network import decoder_layers, site_module
from probes.fit.reading.rendered import Rendered
from probes.sae.train.rows import Float32
from probes.taps import Tap

__all__ = ["Replacement", "SplicedModel"]

Replacement = Callable[[Float32], Float32]
"""(n, d_model) rows to what stands in their place."""

_TOKENS_PER_BATCH = 1024


class SplicedModel:
    """A causal language model in float32 whose rows at one tap are replaced; sinks are left as they are.

    Args:
        model_dir: folder in transformers' layout.
        model: which model that is.
        tap: where.
        skip_first: leading positions that are sinks.
        max_norm: rows above it are sinks too.
    """

    def __init__(self, model_dir: Path, *, model: ModelRef, tap: Tap, skip_first: int, max_norm: float) -> None:
        self._network = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=torch.float32, local_files_only=True
        ).eval()
        self._module = site_module(decoder_layers(self._network, model.num_layers)[tap.layer], tap.site)
        self._skip_first = skip_first
        self._max_norm = max_norm

    def cross_entropies(
        self, requests: Sequence[Rendered], replacements: Mapping[str, Replacement | None]
    ) -> Mapping[str, float]:
        """Mean cross entropy in nats of the next token, behind every row that is read, for each replacement.

        Args:
            requests: token ids.
            replacements: by name; None: nothing is replaced.
        """
        totals = dict.fromkeys(replacements, 0.0)
        count = 0
        for batch in _batches(requests):
            tokens, targets, read = self._padded(batch)
            count += int((targets >= 0).sum())
            for name, replacement in replacements.items():
                totals[name] += self._loss(tokens, targets, read, replacement)
        return {name: total / count for name, total in totals.items()}

    def predictions(self, requests: Sequence[Rendered]) -> int:
        """How many tokens' predictions count."""
        return sum(int((self._padded(batch)[1] >= 0).sum()) for batch in _batches(requests))

    @torch.inference_mode()
    def _loss(
        self, tokens: torch.Tensor, targets: torch.Tensor, read: torch.Tensor, replacement: Replacement | None
    ) -> float:
        with self._replaced(read, replacement):
            # Padded on the right: what is behind a request's end is never attended to by what is before it.
            logits = self._network(input_ids=tokens, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum").item()

    def _padded(self, batch: Sequence[Rendered]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, the tokens to predict (-1: none), and which rows are replaced: (n, longest) each."""
        longest = max(len(request.tokens) for request in batch)
        tokens = torch.zeros((len(batch), longest), dtype=torch.long)
        targets = torch.full((len(batch), longest), -1)
        read = torch.zeros((len(batch), longest), dtype=torch.bool)
        for place, request in enumerate(batch):
            length = len(request.tokens)
            tokens[place, :length] = torch.tensor(request.tokens)
            first = max(request.first, self._skip_first)
            targets[place, first : length - 1] = tokens[place, first + 1 : length]
            read[place, self._skip_first : length] = True
        return tokens, targets, read

    @contextmanager
    def _replaced(self, read: torch.Tensor, replacement: Replacement | None) -> Iterator[None]:
        def hook(_module: torch.nn.Module, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
            value = output[0] if isinstance(output, tuple) else output
            if replacement is None:
                return output
            changed = value.clone()
            chosen = read & (value.norm(dim=-1) <= self._max_norm)
            changed[chosen] = torch.from_numpy(replacement(value[chosen].numpy()))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = self._module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _batches(requests: Sequence[Rendered]) -> Iterator[list[Rendered]]:
    """Those of like length together, at most so many tokens."""
    batch: list[Rendered] = []
    for request in sorted(requests, key=lambda request: -len(request.tokens)):
        if batch and len(batch[0].tokens) * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch
