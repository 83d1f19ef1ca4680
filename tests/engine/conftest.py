"""Servers that the engine tests share: a start takes half a minute, so each runs once for the whole session."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import openai
import pytest

from probes.aggregate.m_of_n import MOfN
from probes.card import Stage
from tests.engine.red_team import red_team_server
from tests.support.server import SMALL, Server, starting, telltale_command, wait_for
from tests.support.tiny import D_MODEL, TinyModel, make_tiny_model, save_direction, save_trigger
from tests.support.withheld_servers import Outside, outside

REFUSAL = "Not this."
STREAM_REFUSAL = "I stop here."

HEAD = f"""\
version: "1"
detectors:
  - artifact: trigger.safetensors
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    expose: scores
    text: "{STREAM_REFUSAL}"
    rules:
"""
STREAM_RULE = """\
      - name: no-trigger-stream
        when: {detector: trigger, stage: stream}
        do: {action: block}
        mode: enforce
"""

GUARDED = f"""\
{HEAD}\
      - name: no-trigger-prompt
        when: {{detector: trigger, stage: prompt}}
        do: {{action: block, text: "{REFUSAL}"}}
        mode: enforce
{STREAM_RULE}"""

OPEN = f"""\
version: "1"
detectors:
  - artifact: trigger.safetensors
  - artifact: chat_only.safetensors
  - artifact: thrice.safetensors
steers:
  - {{name: push, artifact: served_push.safetensors, op: add, strength: 0.25, positions: generated}}
  - {{name: nudge, artifact: served_push.safetensors, op: add, strength: 0.5, positions: all}}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    hold_back: 0
    on_request: [nudge]
    text: "{STREAM_REFUSAL}"
    rules:
      - name: would-block-prompt
        when: {{detector: trigger, stage: prompt}}
        do: {{action: block}}
        mode: shadow
      - name: any-reply
        when: {{detector: trigger, stage: response, aggregate: {{kind: mean}}, above: {{value: -1.0}}}}
        do: {{action: flag}}
        mode: shadow
      - name: flag-prompt
        when: {{detector: chat_only, stage: prompt}}
        do: {{action: flag}}
        mode: enforce
      - name: once-or-twice
        when: {{all: [{{detector: trigger, stage: prompt}}, {{not: {{detector: thrice, stage: prompt}}}}]}}
        do: {{action: flag}}
        mode: shadow
      - name: steer-thrice
        when: {{detector: thrice, stage: prompt}}
        do: {{action: steer, steer: push, gate: latched}}
        mode: enforce
{STREAM_RULE}"""

SEGMENTS = f"""\
{HEAD}\
      - name: tool-block
        when: {{detector: trigger, stage: prompt, segments: [tool]}}
        do: {{action: block, text: "{REFUSAL}"}}
        mode: enforce
      - name: user-flag
        when: {{detector: trigger, stage: prompt, segments: [user]}}
        do: {{action: flag}}
        mode: enforce
{STREAM_RULE}"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The tiny model with its planted feature, and detectors for it beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny_model(folder / "tiny-llama")
    save_trigger(folder / "trigger.safetensors", model.path)
    save_trigger(folder / "chat_only.safetensors", model.path, name="chat_only", formats=("chat",))
    thrice = MOfN(count=3, window=256)
    save_trigger(folder / "thrice.safetensors", model.path, name="thrice", stages=(Stage.PROMPT,), aggregate=thrice)
    direction = np.random.default_rng(4).standard_normal(D_MODEL)
    save_direction(folder / "served_push.safetensors", model.path, direction / np.linalg.norm(direction))
    (folder / "guarded.yaml").write_text(GUARDED)
    (folder / "open.yaml").write_text(OPEN)
    (folder / "segments.yaml").write_text(SEGMENTS)
    return model


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest, tiny: TinyModel) -> Iterator[Mapping[str, Server]]:
    """Those below that the tests of this session ask for, started at once.

    A start is three processes that import vLLM one after the other, each on one core.
    """
    folder = tiny.path.parent
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    plain = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny.path), *SMALL]
    commands = {
        "guarded": telltale_command(tiny.path, folder / "guarded.yaml", *tools),
        "open_": telltale_command(tiny.path, folder / "open.yaml"),
        "segmented": telltale_command(tiny.path, folder / "segments.yaml", "--max-num-batched-tokens", "48"),
        "plain": [*plain, "--host", "127.0.0.1"],
    }
    wanted = {name for item in request.session.items if isinstance(item, pytest.Function) for name in item.fixturenames}
    with ExitStack() as stack:
        found = {
            name: stack.enter_context(starting(command, folder / f"{name}.log"))
            for name, command in commands.items()
            if name in wanted
        }
        for name, server in found.items():
            wait_for(server, "/health" if name == "plain" else "/ready")
        yield found


@pytest.fixture(scope="session")
def guarded(servers: Mapping[str, Server]) -> Server:
    """Blocks the trigger in prompts and replies; tokens are held back until they are scored."""
    return servers["guarded"]


@pytest.fixture(scope="session")
def open_(servers: Mapping[str, Server]) -> Server:
    """Only shadows the trigger in prompts, flags it in chats, cuts streams; tokens are released at once.

    A chat in which the trigger stands three times is steered.
    """
    return servers["open_"]


@pytest.fixture(scope="session")
def segmented(servers: Mapping[str, Server]) -> Server:
    """Blocks the trigger in what tools say and in replies, flags it in what users say; small prefill chunks."""
    return servers["segmented"]


@pytest.fixture(scope="session")
def plain(servers: Mapping[str, Server]) -> Server:
    """vLLM alone."""
    return servers["plain"]


@pytest.fixture(scope="session")
def red_team(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What the red team attacks."""
    with red_team_server(tiny, tmp_path_factory.mktemp("red-team")) as server:
        yield server


def client_of(server: Server) -> openai.OpenAI:
    """The openai client of a server; it does not try again by itself."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def folder(tiny: TinyModel) -> Path:
    """Where the tiny model, its detectors and policies lie."""
    return tiny.path.parent


@pytest.fixture(scope="module")
def far() -> Iterator[Outside]:
    """A judge, a classifier and a model that live elsewhere."""
    with outside() as found:
        yield found
