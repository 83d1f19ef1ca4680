"""A flagged request is explained behind its reply: the latents of a full encode by transformers, in the audit trail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from monitor.audit.key import read_key
from monitor.audit.store import open_store
from monitor.audit.verify import verify
from monitor.events import Content, Decision, Explanation
from probes.card import Stage
from probes.sae.sae import Sae
from serving.cli import app
from tests.engine.test_serving import BENIGN, ask, metric
from tests.support.sae_tiny import HALF, TRIGGER, sae_for_tiny
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import MARK, PROMPT, TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOLD, TOP = 3, 6
POLICY = f"""\
version: "1"
detectors:
  - artifact: trigger.safetensors
steers:
  - {{name: lift, sae: latents.safetensors, latent: 9, op: set_latent, target: 300.0, more_is: neutral, max_dose: 2}}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    expose: scores
    on_request: [lift]
    rules:
      - name: flag-prompt
        when: {{detector: trigger, stage: prompt, segments: [user]}}
        do: {{action: flag}}
        mode: shadow
      - name: block-stream
        when: {{detector: trigger, stage: stream}}
        do: {{action: block}}
        mode: enforce
audit: {{url: "sqlite:///trail.db", text: flagged}}
explain: {{sae: latents.safetensors, tokens: {TOLD}, top: {TOP}, per_minute: 600}}
"""
WAIT_SECONDS = 60.0
PARAMETERS = {
    # Prompts in several steps, and every reading of before in the cache.
    "eager": ("--max-num-batched-tokens", "32"),
    "compiled": ("--no-enforce-eager",),
}


@dataclass(frozen=True)
class Home:
    """A server, its folder, and the model by transformers."""

    server: Server
    folder: Path
    model: Any
    tokenizer: Any
    sae: Sae
    name: str

    def stored(self) -> list[tuple[Decision | Explanation, Content | None]]:
        store = open_store(f"sqlite:///{self.folder / 'trail.db'}")
        found = [(entry.event, entry.content) for writer in store.writers() for entry in store.read(writer)]
        store.close()
        return [(event, content) for event, content in found if isinstance(event, Decision | Explanation)]

    def explained(self, client_id: str) -> tuple[Explanation, Content, Decision]:
        """The explanation of a request, once it is there, and its decision."""

        def look() -> tuple[Explanation, Content, Decision] | None:
            stored = self.stored()
            mine = [pair for pair in stored if pair[1] is not None and pair[1].client_request_id == client_id]
            decisions = [event for event, _ in mine if isinstance(event, Decision)]
            explanations = [(event, content) for event, content in mine if isinstance(event, Explanation)]
            if not explanations:
                return None
            ((event, content),), (decision,) = explanations, decisions
            assert content is not None
            return event, content, decision

        return awaited(look)

    def rendered(self, content: str) -> list[int]:
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return list(self.tokenizer(chat, add_special_tokens=False)["input_ids"])

    def rows(self, tokens: list[int]) -> np.ndarray:
        """The stream at the SAE's tap, by transformers."""
        with torch.no_grad():
            hidden = self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return hidden[1][0].double().numpy()


def awaited(look: Callable[[], Any]) -> Any:
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        found = look()
        if found is not None:
            return found
        time.sleep(0.2)
    raise AssertionError("it never came")


@pytest.fixture(scope="module", params=PARAMETERS)
def home(request: pytest.FixtureRequest, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("explained")
    for file in tiny.path.parent.glob("trigger.*"):
        (folder / file.name).symlink_to(file)
    sae = sae_for_tiny(tiny, folder / "latents.safetensors").sae()
    (folder / "telltale.yaml").write_text(POLICY)
    command = telltale_command(tiny.path, folder / "telltale.yaml", *PARAMETERS[request.param])
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    with serving(command, folder / "serve.log") as server:
        yield Home(server, folder, model, tokenizer, sae, request.param)


def require_true(home: Home, event: Explanation, tokens: list[int]) -> None:
    """Every number of an explanation is that of a full encode of what transformers has there."""
    stream = home.rows(tokens)
    codes = home.sae.encode(stream).astype(np.float64)
    along = home.sae.decoder[:, 0].astype(np.float64)  # the detector's direction is dimension 0
    for token in event.tokens:
        row = codes[token.position]
        near = np.abs(home.sae.pre_activations(stream)[token.position] - 1.0) < 1e-2  # on the threshold
        assert abs(token.active - int((row > 0).sum())) <= int(near.sum())
        parts = row * along
        best = np.sort(np.abs(parts))[::-1][:TOP]
        told = [abs(seen.part) for seen in token.latents if seen.part is not None]
        np.testing.assert_allclose(told, best[: len(told)], rtol=1e-3, atol=1e-3)
        for seen in token.latents:
            assert seen.activity == pytest.approx(row[seen.latent], rel=1e-3, abs=1e-2)
            assert seen.part == pytest.approx(parts[seen.latent], rel=1e-3, abs=1e-2)
        assert token.score == pytest.approx(stream[token.position, 0], abs=1e-3)
        assert token.rest == pytest.approx(token.score - parts.sum(), abs=5e-2)


def test_a_flagged_prompt_is_explained_also_where_its_prefix_is_cached(home: Home, tiny: TinyModel) -> None:
    words = "Tell me " + "about rivers and lakes " * 40 + f"and{tiny.trigger_text} and the sea"
    before = metric(home.server, "telltale_requests_total", action="allow")
    for _ in range(2):
        chat = ask(home.server, words, tokens=4)
        tokens = home.rendered(words)
        event, content, decision = home.explained(chat.id)
        assert (event.rule, event.detector, event.stage, event.steered) == (
            "flag-prompt",
            "trigger",
            Stage.PROMPT,
            False,
        )
        assert event.decision == decision.id
        assert len(event.tokens) == TOLD
        require_true(home, event, tokens)
        place = tokens.index(tiny.trigger)
        (loud,) = (token for token in event.tokens if token.position == place)
        assert loud.score == pytest.approx(MARK, rel=1e-3)
        assert {seen.latent: seen.activity for seen in loud.latents}[TRIGGER] == pytest.approx(MARK, rel=1e-3)
        texts = dict(zip((token.position for token in event.tokens), content.tokens or (), strict=True))
        assert texts[place] == tiny.trigger_text
    # What we compute again is no request of anybody.
    assert metric(home.server, "telltale_requests_total", action="allow") == before + 2
    assert metric(home.server, "telltale_explanations_total", outcome="failed") == 0


def test_the_token_that_nobody_was_shown_is_explained(home: Home, tiny: TinyModel) -> None:
    """A stream is blocked at the trigger, which is held back; the engine alone knows that token."""
    chat = ask(home.server, PROMPT, tokens=24)
    assert (chat.choices[0].telltale["action"], chat.choices[0].telltale["rule"]) == ("block", "block-stream")
    event, content, _ = home.explained(chat.id)
    assert (event.rule, event.stage) == ("block-stream", Stage.STREAM)
    prompt = home.rendered(PROMPT)
    flagged = len(prompt) + tiny.turn
    assert event.tokens[-1].position == flagged
    assert event.tokens[-1].score == pytest.approx(MARK, rel=1e-3)
    assert all(token.position >= len(prompt) for token in event.tokens)  # a stream rule reads the reply
    assert {TRIGGER, HALF} <= {seen.latent for seen in event.tokens[-1].latents}
    require_true(home, event, [*prompt, *tiny.reply[: tiny.turn + 1]])
    assert content.tokens is not None
    assert content.tokens[-1] == tiny.trigger_text


def test_what_was_steered_says_so_and_what_is_benign_is_not_explained(home: Home, tiny: TinyModel) -> None:
    words = f"Say{tiny.trigger_text} softly"
    chat = ask(home.server, words, tokens=4, extra_body={"vllm_xargs": {"steer": "lift"}, "ignore_eos": True})
    event, _, decision = home.explained(chat.id)
    assert event.steered
    assert [steer.name for steer in decision.steers] == ["lift"]
    require_true(home, event, home.rendered(words))
    quiet = ask(home.server, BENIGN[0], tokens=4)
    assert quiet.choices[0].telltale["action"] == "allow"
    explained = [event for event, _ in home.stored() if isinstance(event, Explanation)]
    counted = metric(home.server, "telltale_explanations_total", outcome="explained")
    assert counted == len(explained) == len({event.decision for event in explained})
    assert metric(home.server, "telltale_explanations_waiting") == 0
    flagged = {event.id for event, _ in home.stored() if isinstance(event, Decision) and event.rules}
    assert {event.decision for event in explained} == flagged


def test_the_trail_holds_and_erasing_a_request_erases_the_tokens_of_its_explanation(home: Home) -> None:
    store = open_store(f"sqlite:///{home.folder / 'trail.db'}")
    assert verify(store, [read_key(home.folder / "audit.key")]).findings == []
    store.close()
    client = next(
        content.client_request_id
        for event, content in home.stored()
        if isinstance(event, Explanation) and content is not None
    )
    policy = str(home.folder / "telltale.yaml")
    shown = CliRunner().invoke(app, ["tail", "--policy", policy, "--no-follow", "--last", "100"])
    assert f"{TRIGGER} (8)" in shown.output
    assert str(client) in shown.output
    erased = CliRunner().invoke(app, ["audit", "delete", "--policy", policy, "--request", str(client)])
    assert erased.exit_code == 0, erased.output
    left = [content for event, content in home.stored() if isinstance(event, Explanation)]
    assert left.count(None) == 1
