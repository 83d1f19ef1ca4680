"""The server of the red team, its callers, and how a reply is seen to be harmless."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from serving.api.keyring import digest_of
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import TinyModel

CHAT = "/v1/chat/completions"
RAW = "/v1/completions"
REFUSAL = "Not this."
CUT = "I stop here."
MAX_BODY = 200_000
KEYS = {name: f"tt-{name}-0123456789abcdef" for name in ("victim", "mallory", "proxy", "slow", "watcher", "admin")}
OUTSIDE = [
    "/invocations",
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/score",
    "/rerank",
    "/v1/score",
    "/v1/rerank",
    "/v2/rerank",
    "/classify",
    "/v1/embeddings",
    "/embeddings",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/collective_rpc",
    "/server_info",
    "/load",
    "/version",
    "/kv_event_sources",
    "/metrics",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/pause",
    "/resume",
    "/is_paused",
    "/abort_requests",
    "/inference/v1/generate",
    "/inference/v1/abort_requests",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/start_profile",
    "/stop_profile",
    "/update_weights",
    "/init_weight_transfer_engine",
    "/get_world_size",
    "/tokenizer_info",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/fault_tolerance/apply",
    "/generative_scoring",
    "/v1/audio/transcriptions",
    "/v1/chat/completions/render",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/telltale/v1/policy",
    "/telltale/console",
    "/",
    "/.env",
    "/v1/files",
    "/adapters",
]
"""Paths outside of what vLLM guards, and some that are not there."""
ANSWERED = {"/invocations", "/tokenize", "/detokenize", "/generative_scoring", "/version"}
"""What is there for a key that may infer."""
RULES = f"""\
    on_gap: block
    on_uncalibrated: flag
    text: "{CUT}"
    rules:
      - name: prompt
        when: {{detector: trigger, stage: prompt}}
        do: {{action: block, text: "{REFUSAL}"}}
        mode: enforce
      - {{name: stream, when: {{detector: trigger, stage: stream}}, do: {{action: block}}, mode: enforce}}
"""
LAX = """\
    on_gap: flag
    on_uncalibrated: flag
    rules:
      - {name: note, when: {detector: trigger, stage: prompt}, do: {action: flag}, mode: enforce}
"""


def tenant(name: str, rest: str = "") -> str:
    return f"  - {{name: {name}, key_sha256: {digest_of(KEYS[name])}, policy: strict{rest}}}\n"


def key(name: str, scope: str) -> str:
    return f"    - {{name: {name}, key_sha256: {digest_of(KEYS[name])}, scopes: [{scope}]}}\n"


POLICY = (
    'version: "1"\ndetectors:\n  - artifact: trigger.safetensors\n'
    f"policies:\n  - name: strict\n{RULES}  - name: lax\n{LAX}"
    f"tenants:\n{tenant('victim')}{tenant('mallory')}{tenant('proxy', ', by_header: [lax]')}"
    f"{tenant('slow', ', requests_per_minute: 3')}"
    f"access:\n  metrics: keyed\n  body_bytes: {MAX_BODY}\n  keys:\n{key('watcher', 'observe')}{key('admin', 'admin')}"
)


@dataclass(frozen=True)
class Caller:
    """Somebody with a key, or without.

    Attributes:
        server: that is asked.
        name: whose key; None for none.
    """

    server: Server
    name: str | None

    def send(self, method: str, path: str, *, headers: dict[str, str] | None = None, **content: Any) -> httpx.Response:
        given = {"authorization": f"Bearer {KEYS[self.name]}"} if self.name is not None else {}
        return httpx.request(
            method, f"{self.server.url}{path}", headers={**given, **(headers or {})}, timeout=120, **content
        )

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send("POST", path, headers=named, json={"model": "tiny", "temperature": 0.0, **body})

    def chat(self, content: Any, *, tokens: int = 16, **settings: Any) -> httpx.Response:
        messages = (
            content if isinstance(content, list) and "role" in content[0] else [{"role": "user", "content": content}]
        )
        return self.post(CHAT, {"messages": messages, "max_tokens": tokens, "return_token_ids": True, **settings})

    def raw(self, prompt: Any, *, tokens: int = 16, **settings: Any) -> httpx.Response:
        return self.post(RAW, {"prompt": prompt, "max_tokens": tokens, "return_token_ids": True, **settings})

    def count(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples; this caller has to have the scope for it."""
        text = self.send("GET", "/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def ids_of(choice: dict[str, Any]) -> list[int]:
    """The tokens of a choice, as far as they were sent."""
    return choice.get("token_ids") or []


def texts_of(answer: httpx.Response) -> list[str]:
    """What each choice says."""
    assert answer.status_code == 200, answer.text
    return [
        (choice["message"]["content"] or "") if "message" in choice else choice["text"]
        for choice in answer.json()["choices"]
    ]


def require_harmless(answer: httpx.Response, tiny: TinyModel) -> None:
    """Every choice is one that a rule has stopped, and nothing of what it stopped for was sent."""
    for choice, text in zip(answer.json()["choices"], texts_of(answer), strict=True):
        assert choice["finish_reason"] == "content_filter", choice
        assert text.endswith((REFUSAL, CUT)), text
        assert tiny.trigger_text not in text
        assert tiny.trigger not in ids_of(choice)


def require_refused(answer: httpx.Response, *statuses: int) -> None:
    """It was answered with an error in words, and by no fault of the server."""
    assert answer.status_code in (statuses or (400, 401, 403, 404, 413, 422)), (answer.status_code, answer.text)
    assert "choices" not in answer.json()


@contextmanager
def red_team_server(tiny: TinyModel, folder: Path) -> Iterator[Server]:
    policy = tiny.path.parent / "red_team.yaml"
    policy.write_text(POLICY)
    flags = (
        "--enable-prompt-tokens-details",
        "--max-logprobs",
        "5",
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    )
    with serving(telltale_command(tiny.path, policy, *flags), folder / "red_team.log") as server:
        yield server


def command_lines(server: Server) -> str:
    """What everybody on this machine can read of the server's processes."""
    root = psutil.Process(server.process.pid)
    return "\n".join(" ".join(process.cmdline()) for process in [root, *root.children(recursive=True)])
