"""A scripted application under the layer that withholds: a real monitor decides, readouts and texts are the test's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from vllm.v1.engine import EngineCoreOutput

from monitor.catalogue import OUTCOMES
from monitor.exporter import Exporter
from monitor.monitor import Monitor
from monitor.report import encode_report, make_report
from monitor.request import is_blocked
from monitor.rollout import Subjects
from probes.card import Format
from serving.api.classifier import Classifier
from serving.api.desk import Desk
from serving.api.holding import HoldMiddleware
from serving.api.opinions import Opinions
from serving.api.upstream import Upstream
from serving.api.withheld import OUTCOME_HEADER
from serving.engine.carrier import CARRIER_ID
from serving.engine.frontend import Frontend
from serving.hold import Hold, Reply
from serving.origin import current_origin
from tests.unit.artifacts import make_card, plan_of, policy_text, unit_artifact
from tests.unit.script import Script, chat

REFUSAL = "I can't help with that."
KEY = b"rollout"


@dataclass
class Turn:
    """One attempt as the model makes it: scores of the prompt and of the reply's tokens, and the reply."""

    prompt: Sequence[float]
    reply: Sequence[float] = (0.0, 0.0)
    text: str = "hello"
    status: int = 200


class ScriptedJudge:
    """The served model as a judge: answers what the test says, raises it, or (None) does not answer."""

    def __init__(self) -> None:
        self.answer: bool | Exception | None = False
        self.asked: list[tuple[str, str]] = []

    async def flags(self, question: str, text: str) -> bool:
        self.asked.append((question, text))
        if self.answer is None:
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        return bool(self.answer)


@dataclass
class Withheld:
    """The layer over a scripted application.

    Attributes:
        turns: what comes next.
        bodies: as the application got them.
        holds: of its attempts.
        drawn: whom rollouts by request took each attempt for.
    """

    folder: Path
    rules: Sequence[str]
    policy: str = ""
    turns: list[Turn] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    holds: list[Hold | None] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        plan = plan_of(
            self.folder,
            policy_text("\n".join(self.rules), policy=self.policy, names=("harm", "other")),
            {name: unit_artifact(make_card(name), n) for n, name in enumerate(("harm", "other"))},
        )
        self.monitor, self.script, self.judge = Monitor(plan, rollout_key=KEY), Script(plan), ScriptedJudge()
        self.frontend = Frontend()
        self.frontend.configure(SimpleNamespace(plan=plan))  # type: ignore[arg-type]
        self.opinions = Opinions(self.judge, Classifier({}), lambda tokens: f"<{len(tokens)}>", self.clock)
        self.registry = CollectorRegistry()
        self.frontend.export_to(Exporter(plan, self.registry))
        desk = Desk(self.opinions, Upstream({"KEY": "sk-far"}), self.frontend)
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["POST"])])
        self.app = HoldMiddleware(app, frontend=self.frontend, desk=lambda: desk)

    @property
    def told(self) -> list[tuple[str, str]]:
        """Rules that were carried out, and what came of each, as the metrics say."""
        samples = (sample for family in self.registry.collect() for sample in family.samples)
        counted = (sample for sample in samples if sample.name == OUTCOMES.name)
        return sorted(
            (sample.labels["rule"], sample.labels["outcome"]) for sample in counted for _ in range(int(sample.value))
        )

    async def ask(self, *turns: Turn, path: str = "/v1/chat/completions", **body: Any) -> tuple[str, str | None]:
        """The text that a client gets, and how it came about."""
        self.turns = list(turns)
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post(path, json={"messages": [{"role": "user", "content": "hi"}], **body})
        outcome = answer.headers.get(OUTCOME_HEADER)
        said = "".join(json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: "))
        text = said if body.get("stream") and answer.status_code == 200 else answer.json()["text"]
        return text, outcome.rpartition("outcome=")[2] if outcome is not None else None

    async def _answer(self, request: Request) -> Response:
        body, hold = await request.json(), current_origin().hold
        self.bodies.append(body)
        self.holds.append(hold)
        refused = hold is not None and hold.refusal is not None
        turn = Turn([0.0]) if refused else self.turns.pop(0)
        if turn.status != 200:
            return JSONResponse({"text": "error"}, status_code=turn.status)
        pieces = self._pieces(turn, hold, f"r{len(self.bodies)}")
        if body.get("stream"):
            return StreamingResponse(
                (f"data: {json.dumps(piece)}\n\n" for piece in pieces), media_type="text/event-stream"
            )
        return JSONResponse({"text": list(pieces)[-1] if hold is None else "".join(pieces)})

    def _pieces(self, turn: Turn, hold: Hold | None, name: str) -> Iterator[str]:
        """The reply, as the front end would let it out."""
        subject = hold.sign(name, 1) if hold is not None else name
        self.drawn.append(subject)
        settings = {"attempt": hold.attempt, "refusal": hold.refusal} if hold is not None else {}
        num_prompt = len(turn.prompt)
        self.monitor.admit(
            name,
            num_prompt=num_prompt,
            policy=None,
            fmt=Format.CHAT,
            prompt=chat(num_prompt),
            subjects=Subjects("t", "s", subject),
            **settings,  # type: ignore[arg-type]
        )
        rows, sampled = [*turn.prompt, *turn.reply], 1
        for at in [0, *range(num_prompt, len(rows))]:
            count = num_prompt if at == 0 else 1
            self.monitor.observe(self.script.step([(name, range(at, at + count), self._scored(rows[at : at + count]))]))
            if is_blocked(self.monitor.get(name)):
                break
            self._report([name], [])
            sampled += 1
            if at:
                yield f"{turn.text}{at} "
        ended = self.monitor.finish(
            name, num_positions=self.monitor.positions_of(name) + 1, sampled=sampled, aborted=False
        )
        self._report([], [ended])
        record = self.frontend.record(name)
        assert record is not None
        if hold is not None:
            record.withheld = hold.is_open
            hold.replies[name] = Reply(name, record, [1] * num_prompt, [2] * sampled)
        if record.blocked_text is not None:
            yield record.blocked_text

    def _scored(self, scores: Sequence[float]) -> Any:
        return self.script.rows([[score, score / 2] for score in scores])

    def _report(self, names: Sequence[str], ended: Sequence[Any]) -> None:
        live = [request for name in names if (request := self.monitor.get(name)) is not None]
        report = encode_report(make_report(self.monitor, live, ended, None))
        carrier = EngineCoreOutput(request_id=CARRIER_ID, new_token_ids=[], routed_experts=report)
        self.frontend.take_out([carrier])
