"""A causal language model in float32 that is steered by a hook: the offline peer of the serving engine's writes.

It knows tokens and steers, no behaviour and no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes.card import Format, ModelRef
from probes.errors import TelltaleError
from probes.fit.reading.network import decoder_layers
from probes.fit.reading.padded import NO_POSITION, Padded, batches_by_length, left_padded
from probes.fit.reading.rendered import prompt_tokens
from probes.fit.rows.example import Example
from probes.fit.steer.writes import Writes
from probes.steering.base import Float64

__all__ = ["Reply", "SteeredModel", "SteeredModelError"]


class SteeredModelError(TelltaleError, ValueError):
    """A model cannot be steered offline."""


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What the model answered, greedily.

    Attributes:
        tokens: without the one that ends the reply.
        text: of the tokens.
        doses: (written,) float64, of the request's rows that were written to, in the stream's own units.
    """

    tokens: tuple[int, ...]
    text: str
    doses: Float64


class SteeredModel:
    """A model in transformers' layout.

    Args:
        model_dir: its folder.
        model: which one that is.
    Raises:
        probes.fit.reading.network.ActivationError: its decoder layers are not found.
    """

    def __init__(self, model_dir: Path, *, model: ModelRef) -> None:
        self.model = model
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        self._network: Any = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=torch.float32, local_files_only=True
        ).eval()
        self._layers = decoder_layers(self._network, model.num_layers)
        self._ends = torch.tensor(_ends(self._network, self._tokenizer))

    def chat(self, prompt: str, *, system: str | None = None) -> list[int]:
        """Tokens of one user message, with the generation prompt.

        Args:
            prompt: of the user.
            system: the system message; None leaves it to the template.
        Raises:
            SteeredModelError: the model has no chat template, or it takes no system message.
        """
        turns = () if system is None else (("system", system), ("user", prompt))
        example = Example(text=prompt, label=0, source="prompt", group="prompt", turns=turns)
        try:
            return prompt_tokens(self._tokenizer, example, Format.CHAT)
        except (TemplateError, ValueError) as error:
            raise SteeredModelError(
                f"{self.model.id}: its chat template refuses this prompt ({error}). Steering is evaluated in chats: "
                "use a model with a template, and one that takes a system message where an instruction is given."
            ) from error

    def text(self, text: str) -> list[int]:
        """Tokens of a text as it stands, with what the tokenizer puts before it."""
        return list(self._tokenizer(text)["input_ids"])

    def continuation(self, text: str) -> list[int]:
        """Tokens of a text that follows others."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def generate(
        self, prompts: Sequence[Sequence[int]], *, steer: Writes | None = None, max_new_tokens: int
    ) -> list[Reply]:
        """Answer every prompt greedily, up to the model's end-of-sequence token.

        As in the engine, the row of a generated token is computed, and written to, when the next one is asked for:
        the first token of a reply never feels a steer of generated rows.

        Args:
            prompts: token ids, none empty.
            steer: what is written meanwhile.
            max_new_tokens: at most so many.
        """
        replies: dict[int, Reply] = {}
        for batch in batches_by_length(prompts):
            found = self._generate([prompts[i] for i in batch], steer, max_new_tokens)
            replies.update(zip(batch, found, strict=True))
        return [replies[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def logits(self, padded: Padded, *, steer: Writes | None, num_prompts: Sequence[int], keep: int) -> torch.Tensor:
        """Next-token logits of given tokens.

        Args:
            padded: the tokens.
            steer: what is written.
            num_prompts: (n,), how many of each sequence's tokens are its prompt.
            keep: of the last so many rows.
        Returns: (n, keep, vocabulary) float32.
        """
        with self._written(steer, num_prompts, padded) as written:
            if written is not None:
                written.positions = padded.positions
            logits: torch.Tensor = self._forward(padded, use_cache=False, logits_to_keep=keep).logits
        return logits

    @torch.inference_mode()
    def stream(self, padded: Padded, layer: int) -> torch.Tensor:
        """The residual stream after a layer, of rows that nobody steers: (n, longest, d_model) float32."""
        kept: list[torch.Tensor] = []
        handle = self._layers[layer].register_forward_hook(lambda _module, _inputs, output: kept.append(_first(output)))
        try:
            self._forward(padded, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        return kept[0]

    @contextmanager
    def resumed(self, layer: int, stream: torch.Tensor) -> Iterator[None]:
        """Within it, a forward pass begins behind a layer: those up to it are not computed again.

        Hooks run all the same, so that a steer writes to the kept stream as it would to a computed one.

        Args:
            layer: the last one that is not computed.
            stream: what it gave, by ``stream`` of the same padded tokens.
        """
        skipped = list(self._layers[: layer + 1])
        for module in skipped[:-1]:
            module.forward = _hand_on
        skipped[-1].forward = _give(stream)
        try:
            yield
        finally:
            for module in skipped:
                del module.forward

    def _generate(self, rows: Sequence[Sequence[int]], steer: Writes | None, max_new_tokens: int) -> list[Reply]:
        padded = left_padded(rows)
        lengths = torch.tensor([len(row) for row in rows])
        replies: list[list[int]] = [[] for _ in rows]
        alive = torch.ones(len(rows), dtype=torch.bool)
        with torch.inference_mode(), self._written(steer, [len(row) for row in rows], padded) as written:
            if written is not None:
                written.positions = padded.positions
            output = self._forward(padded, use_cache=True, logits_to_keep=1)
            mask = padded.mask
            for step in range(max_new_tokens):
                tokens = output.logits[:, -1].argmax(dim=-1)
                alive = alive & ~torch.isin(tokens, self._ends)
                for place in alive.nonzero().flatten().tolist():
                    replies[place].append(int(tokens[place]))
                if step + 1 == max_new_tokens or not bool(alive.any()):
                    break
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                positions = (lengths + step)[:, None]
                if written is not None:
                    # A reply that has ended is carried along, and no longer counts.
                    written.positions = torch.where(alive[:, None], positions, NO_POSITION)
                output = self._network(
                    input_ids=tokens[:, None],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
        doses = [np.empty(0)] * len(rows) if written is None else written.doses(len(rows))
        texts = [self._tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
        return [Reply(tuple(reply), text, dose) for reply, text, dose in zip(replies, texts, doses, strict=True)]

    def _forward(self, padded: Padded, *, use_cache: bool, logits_to_keep: int) -> Any:
        return self._network(
            input_ids=padded.tokens,
            attention_mask=padded.mask,
            position_ids=padded.positions.clamp(min=0),
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )

    @contextmanager
    def _written(self, steer: Writes | None, num_prompts: Sequence[int], padded: Padded) -> Iterator[_Writer | None]:
        if steer is None:
            yield None
            return
        if steer.tap.layer >= len(self._layers) or steer.update.d_model != self.model.d_model:
            raise SteeredModelError(
                f"steer {steer.name!r} writes {steer.update.d_model} dimensions after {steer.tap}; {self.model.id} "
                f"has {self.model.d_model} and the layers 0 to {len(self._layers) - 1}. It belongs to another model."
            )
        writer = _Writer(steer, num_prompts, padded.positions)
        handle = self._layers[steer.tap.layer].register_forward_hook(writer)
        try:
            yield writer
        finally:
            handle.remove()


class _Writer:
    """The hook. ``positions`` is set before each forward pass: (n, rows of the pass), -1 for what is no token."""

    def __init__(self, steer: Writes, num_prompts: Sequence[int], positions: torch.Tensor) -> None:
        spans = torch.tensor([steer.span(number) for number in num_prompts])
        self._start, self._stop = spans[:, :1], spans[:, 1:]
        self._update = steer.update
        self._doses: list[tuple[torch.Tensor, Float64]] = []
        self.positions = positions

    def __call__(self, _module: torch.nn.Module, _inputs: object, output: Any) -> Any:
        stream = _first(output)
        where = (self.positions >= self._start) & (self.positions < self._stop)
        rows = stream[where]
        if not len(rows):
            return None
        new, dose = self._update.apply(rows.double().numpy(), np.ones(len(rows), dtype=np.bool_))
        self._doses.append((where.nonzero()[:, 0], dose))
        # Rows that are not named keep their bits: nothing is added to them, not even zero.
        written = stream.clone()
        written[where] = torch.from_numpy(new).to(stream.dtype)
        return (written, *output[1:]) if isinstance(output, tuple) else written

    def doses(self, count: int) -> list[Float64]:
        """For each of so many sequences, the doses of its rows."""
        if not self._doses:
            return [np.empty(0)] * count
        owners = torch.cat([owner for owner, _ in self._doses]).numpy()
        values = np.concatenate([dose for _, dose in self._doses])
        return [values[owners == number] for number in range(count)]


def _first(output: Any) -> torch.Tensor:
    stream = output[0] if isinstance(output, tuple) else output
    if not isinstance(stream, torch.Tensor):
        raise SteeredModelError(
            f"a decoder layer returns a {type(stream).__name__}, not a tensor: it cannot be written to. "
            "Use a decoder-only model of transformers."
        )
    return stream


def _hand_on(hidden_states: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
    return hidden_states


def _give(stream: torch.Tensor) -> Callable[..., torch.Tensor]:
    def forward(*_args: object, **_kwargs: object) -> torch.Tensor:
        return stream

    return forward


def _ends(network: Any, tokenizer: Any) -> list[int]:
    found = network.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]
