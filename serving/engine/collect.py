"""Collect activations: lines of a file through a capturing engine into a folder, one shard after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import serving
from monitor.types import Role
from probes.card import Format
from probes.fit.activation_manifest import CollectSettings, Manifest, TokenPositions
from probes.fit.activation_writer import ActivationWriter, PreparedRequest, ShardBuffer, shards_of
from probes.fit.prompt_file import PromptFile, PromptLine
from probes.taps import Tap
from serving.engine.capture_engine import CaptureEngine, batch_settings, capture_config
from serving.engine.request_tokens import RequestTokens
from serving.engine.runtime import read_served_model


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOrder:
    """What is to be collected.

    Attributes:
        prompts: file of JSON lines; see ``probes.fit.prompt_file``.
        out: folder; a new one, or one in which the same order was interrupted.
        taps: where the model is read; each once.
        text_format: whether prompts go through the chat template.
        positions: which tokens are kept.
        model_id: what people call the model.
        arguments: of vLLM, the model's folder or name first.
        shard_bytes: of a shard's tensors, at most.
        shard_tokens: computed for a shard, at most: what a killed run has to compute again.
    """

    prompts: Path
    out: Path
    taps: tuple[Tap, ...]
    text_format: Format
    positions: TokenPositions
    model_id: str
    arguments: tuple[str, ...]
    shard_bytes: int
    shard_tokens: int


def collect(order: CollectOrder, *, say: Callable[[str], None], progress: Callable[[int, int], None]) -> Manifest:
    """Collect, or go on where an interrupted run has stopped; does nothing where all is there.

    Every line is looked at before the first one is computed. The whole process is the engine's from then on.

    Args:
        order: what to collect.
        say: told what is being done.
        progress: told after each step how many tokens have been computed, and how many there are.
    Returns: the manifest of the finished folder.
    Raises:
        probes.errors.TelltaleError: a line, an option or the folder cannot be used, or the engine left rows out.
    """
    file = PromptFile.open(order.prompts, require=lambda line: _problem(line, order))
    config = capture_config(order.arguments, order.taps)
    from vllm.renderers import renderer_from_config

    settings = CollectSettings(
        model=read_served_model(config, model_id=order.model_id),
        taps=tuple(str(tap) for tap in sorted(order.taps)),
        format=order.text_format,
        positions=order.positions,
        input_digest=file.digest,
        input_requests=file.count,
        shard_bytes=order.shard_bytes,
        shard_tokens=order.shard_tokens,
        engine=batch_settings(config),
        created_by=f"telltale {serving.__version__}",
    )
    lines = RequestTokens(
        config, renderer_from_config(config), text_format=order.text_format, positions=order.positions
    )
    with ActivationWriter(order.out, settings, roles={role.value: role.code for role in Role}) as writer:
        if writer.manifest.complete:
            say(f"{order.out} is complete already")
            return writer.manifest
        done = writer.manifest.requests
        left = sum(len(request.tokens) for request in lines.prepare(file, first=done))
        say(f"{done} of {file.count} requests are there, {left} tokens are left to compute")
        if left:
            total = writer.manifest.tokens + left
            engine = CaptureEngine(config)
            for requests in shards_of(lines.prepare(file, first=done), settings):
                _collect_shard(engine, writer, requests, lambda tokens: progress(tokens, total))
            engine.close()
        writer.finish()
        return writer.manifest


def _collect_shard(
    engine: CaptureEngine,
    writer: ActivationWriter,
    requests: Sequence[PreparedRequest],
    progress: Callable[[int], None],
) -> None:
    """Its memory is given back before the next shard takes its own."""
    shard = ShardBuffer(requests, writer.manifest.settings)
    before = writer.manifest.tokens
    sinks = engine.fill(shard, lambda tokens: progress(before + tokens))
    writer.write(shard, sinks=sinks)


def _problem(line: PromptLine, order: CollectOrder) -> str | None:
    if order.text_format is Format.RAW and line.text is None:
        return "holds a conversation, and --format raw takes text as it is: use --format chat."
    if order.positions is TokenPositions.RESPONSE and line.response is None:
        return "holds no reply, and --positions response keeps nothing else."
    return None
