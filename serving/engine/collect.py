"""Collect activations: lines of a file through a capturing engine into a folder, one shard after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import serving
from monitor.types import Role
from probes.card import Format
from probes.fit.reading.activation_manifest import CollectSettings, Manifest, TokenPositions
from probes.fit.reading.activation_writer import ActivationWriter, PreparedRequest, ShardBuffer, shards_of
from probes.fit.rows.prompt_file import PromptFile, PromptLine
from probes.taps import Tap
from serving.engine.capture_engine import CaptureEngine, batch_settings, capture_config
from serving.engine.runtime import read_served_model

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from serving.engine.request_tokens import RequestTokens

_ROLES = {role.value: role.code for role in Role}


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOrder:
    """What is read of which model.

    Attributes:
        taps: where; each once.
        text_format: whether prompts go through the chat template.
        positions: which tokens are kept.
        model_id: what people call the model.
        arguments: of vLLM, the model's folder or name first.
        shard_bytes: of a shard's tensors, at most.
        shard_tokens: computed for a shard, at most: what a killed run has to compute again.
    """

    taps: tuple[Tap, ...]
    text_format: Format
    positions: TokenPositions
    model_id: str
    arguments: tuple[str, ...]
    shard_bytes: int
    shard_tokens: int


class Collector:
    """Collects by one order. The whole process is the engine's once it has begun.

    In memory are the tensors of one shard, the tokens of its requests and the readouts of one step, however long the
    file is.

    Args:
        order: what to read.
        say: told what is being done.
    """

    def __init__(self, order: CollectOrder, *, say: Callable[[str], None]) -> None:
        self._order = order
        self._say = say

    def collect(self, prompts: Path, out: Path, *, progress: Callable[[int, int], None]) -> Manifest:
        """Collect, or go on where an interrupted run has stopped; does nothing where all is there.

        Every line is looked at before the first one is computed.

        Args:
            prompts: file of JSON lines; see ``probes.fit.rows.prompt_file``.
            out: folder; a new one, or one in which the same run was interrupted.
            progress: told after each step how many tokens have been computed, and how many there are.
        Returns: the manifest of the finished folder.
        Raises:
            probes.errors.TelltaleError: a line, an option or the folder cannot be used, or the engine left rows out.
        """
        file = PromptFile.open(prompts, require=self._problem)
        with ActivationWriter(out, self._settings(file), roles=_ROLES) as writer:
            if writer.manifest.complete:
                self._say(f"{out} is complete already")
                return writer.manifest
            done = writer.manifest.requests
            left = sum(len(request.tokens) for request in self._requests.prepare(file, first=done))
            self._say(f"{done} of {file.count} requests are there, {left} tokens are left to compute")
            total = writer.manifest.tokens + left
            for requests in shards_of(self._requests.prepare(file, first=done), writer.manifest.settings):
                self._collect_shard(writer, requests, lambda tokens: progress(tokens, total))
            writer.finish()
            return writer.manifest

    def close(self) -> None:
        """End the engine, if it was started."""
        if "_engine" in vars(self):
            self._engine.close()

    @cached_property
    def _config(self) -> VllmConfig:
        return capture_config(self._order.arguments, self._order.taps)

    @cached_property
    def _requests(self) -> RequestTokens:
        from vllm.renderers import renderer_from_config

        from serving.engine.request_tokens import RequestTokens

        order = self._order
        renderer = renderer_from_config(self._config)
        return RequestTokens(self._config, renderer, text_format=order.text_format, positions=order.positions)

    @cached_property
    def _engine(self) -> CaptureEngine:
        return CaptureEngine(self._config)

    def _settings(self, file: PromptFile) -> CollectSettings:
        order = self._order
        return CollectSettings(
            model=read_served_model(self._config, model_id=order.model_id),
            taps=tuple(str(tap) for tap in sorted(order.taps)),
            format=order.text_format,
            positions=order.positions,
            input_digest=file.digest,
            input_requests=file.count,
            shard_bytes=order.shard_bytes,
            shard_tokens=order.shard_tokens,
            engine=batch_settings(self._config),
            created_by=f"telltale {serving.__version__}",
        )

    def _collect_shard(
        self, writer: ActivationWriter, requests: Sequence[PreparedRequest], progress: Callable[[int], None]
    ) -> None:
        """A method of its own: the shard's memory is given back before the next one takes its own."""
        shard = ShardBuffer(requests, writer.manifest.settings)
        before = writer.manifest.tokens
        sinks = self._engine.fill(shard, lambda tokens: progress(before + tokens))
        writer.write(shard, sinks=sinks)

    def _problem(self, line: PromptLine) -> str | None:
        if self._order.text_format is Format.RAW and line.text is None:
            return "holds a conversation, and --format raw takes text as it is: use --format chat."
        if self._order.positions is TokenPositions.RESPONSE and line.response is None:
            return "holds no reply, and --positions response keeps nothing else."
        return None
