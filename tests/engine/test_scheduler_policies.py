"""Which policy a request gets in vLLM's scheduler: the one under its MAC, and the strictest without a valid one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.rollout import Subjects
from monitor.segments import PromptMap, Run
from monitor.types import Role
from probes.card import Format
from serving.engine.trust import EXTRA_KEY, KEY_VARIABLE, TrustedData, seal
from tests.engine.test_schedulers import BLOCK, Rig
from tests.support.tiny import TinyModel, save_linear

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = [3, 1, 4, 1, 5]
NEVER, ALWAYS = 1e9, -1e9
POLICY = """\
version: "1"
detectors: [{artifact: scripted.safetensors}]
policies:
"""
TENANT = f"{{name: t, key_sha256: {'a' * 64}, policy: lax, by_header: [strict, all]}}"


def rule(name: str, above: float, do: str = "action: block", more: str = "") -> str:
    when = f"{{detector: scripted, stage: stream, aggregate: {{kind: max}}, above: {{value: {above}}}}}"
    return f"{{name: {name}, when: {when}, do: {{{do}}}, mode: enforce{more}}}"


def policy(name: str, *rules: str) -> str:
    listed = "".join(f"      - {text}\n" for text in rules)
    return f"  - name: {name}\n    on_gap: block\n    on_uncalibrated: allow\n    rules:\n{listed}"


class Signing(Rig):
    """Submits requests with the data that a front end, or somebody else, put into them."""

    def send(self, name: str, trusted: object, *, max_tokens: int = 6) -> None:
        self.put = trusted
        self.submit(name, PROMPT, max_tokens)

    def admit(self, request: Any) -> None:
        request.sampling_params.extra_args = {EXTRA_KEY: self.put} if self.put is not None else {}
        self._add(request)

    def run(self) -> dict[str, tuple[str, str, str]]:
        """To the end: of each request the name of its policy, the action and its rule."""
        while self.busy():
            self.tick()
        monitor = self.recorder.monitor
        return {
            name: (monitor.policy_of(done.request).name, done.request.action.action.value, done.request.rule)
            for name, done in self.recorder.ended.items()
        }


@pytest.fixture
def signing(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Signing:
    from vllm.engine.arg_utils import EngineArgs

    from serving.engine import runtime
    from serving.engine.scheduler import TelltaleScheduler

    save_linear(tmp_path / "scripted.safetensors", tiny.path, name="scripted", direction=np.eye(128)[1], skip_first=1)
    (tmp_path / "policy.yaml").write_text(
        POLICY
        + policy("lax", rule("note", ALWAYS, "action: flag"))
        + policy("strict", rule("stop", ALWAYS))
        + policy("all", rule("whole", NEVER, "action: block, scope: request"), rule("note", ALWAYS, "action: flag"))
        + f"tenants:\n  - {TENANT}\n"
    )
    monkeypatch.setenv("TELLTALE_CONFIG", str(tmp_path / "policy.yaml"))
    monkeypatch.setenv(KEY_VARIABLE, "0" * 64)
    runtime._deploy.cache_clear()
    arguments = EngineArgs(model=str(tiny.path), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
    config = arguments.create_engine_config()
    config.cache_config.block_size = BLOCK
    rig = Signing(TelltaleScheduler, config, seed=1, depth=0, drafts=False)
    rig._add = rig.scheduler.add_request
    rig.scheduler.add_request = rig.admit
    return rig


def data(name: str | None, request: str = "a") -> TrustedData:
    prompt = PromptMap((Run(Role.USER, len(PROMPT)),), stream_from=len(PROMPT))
    return TrustedData(name, Format.CHAT, prompt, subjects=Subjects("t", "", request))


def test_the_policy_under_the_mac_is_the_one_that_judges(signing: Signing) -> None:
    signing.send("first", seal(data(None), "first"))
    for name in ("lax", "strict"):
        signing.send(name, seal(data(name), name))
    assert signing.recorder.monitor.tally.unsigned == 0
    assert signing.run() == {
        "first": ("lax", "flag", "note"),
        "lax": ("lax", "flag", "note"),
        "strict": ("strict", "block", "stop"),
    }


@pytest.mark.covers("trusted data forged or changed", "kept out")
def test_whatever_has_no_valid_mac_gets_the_strictest(signing: Signing) -> None:
    """A client that talked to the engine itself could name the laxest policy of all."""
    good = seal(data("lax"), "other")
    changed = seal(data("strict"), "changed")
    changed["body"] = changed["body"].replace('"strict"', '"lax"')
    forged = {
        "nothing": None,
        "of-another-request": good,
        "changed": changed,
        "another-key": seal(data("lax"), "another-key", environment={KEY_VARIABLE: "1" * 64}),
        "no-mac": {"body": good["body"], "mac": ""},
    }
    for name, trusted in forged.items():
        signing.send(name, trusted)
    signing.send("unknown-policy", seal(data("laxest"), "unknown-policy"))
    assert signing.recorder.monitor.tally.unsigned == len(forged)
    assert set(signing.run().values()) == {("strictest", "block", "strict/stop")}


def test_choices_of_a_request_carry_its_subject(signing: Signing) -> None:
    """vLLM names the choices of a request; they are one request for a block of all, however they were signed."""
    trusted = seal(data("all", "r"), "r")
    for child in range(3):
        signing.send(f"{child}_r", trusted, max_tokens=40)
    for _ in range(3):
        signing.tick()
    monitor = signing.recorder.monitor
    live = [monitor.get(f"{child}_r") for child in range(3)]
    choices = {id(item.choices) for item in live if item is not None}
    assert len(choices) == 1
    assert live[1] is not None
    assert live[1].choices is not None
    live[1].choices.block("whole", "No.")  # as its rule does when it fires
    assert set(signing.run().values()) == {("all", "block", "whole")}
    assert max(len(said) for said in signing.said.values()) < 6
