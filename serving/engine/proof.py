"""The proof that an engine is monitored: every process runs the same plan, and a request through it is seen whole."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

import serving
from monitor.segments import PromptMap, Run
from monitor.types import Role
from probes.card import Format
from probes.errors import TelltaleError
from serving.engine.frontend import Frontend, record_of
from serving.engine.records import Record
from serving.origin import Origin, enter_origin, leave_origin

_PROMPT_TOKENS = 8
_NEW_TOKENS = 3


class ProofError(TelltaleError, RuntimeError):
    """A part of the server is not monitored. The server must not serve."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen.

    Attributes:
        digest: of the plan, the same in every process.
        engines: how many schedulers answered.
        workers: how many workers answered.
        taps: tap -> how often it ran during the proof's request, summed over workers.
        scored: positions of the request that were scored.
        skipped: the others, by reason.
        described: the ``telltale`` object of the request.
    """

    digest: str
    engines: int
    workers: int
    taps: Mapping[str, int]
    scored: int
    skipped: Mapping[str, int]
    described: Mapping[str, Any]

    def summary(self) -> dict[str, Any]:
        """In few words, for the log."""
        return {"digest": self.digest[:12], "engines": self.engines, "workers": self.workers, "taps": dict(self.taps)}


async def prove(engine: Any, frontend: Frontend) -> Proof:
    """Ask every process what it runs, send one request through, and check that all of it was scored.

    Args:
        engine: vLLM's ``AsyncLLM``.
        frontend: of this process.
    Raises:
        ProofError: says which part does not answer, differs or does not see.
    """
    plan = frontend.deployment.plan
    engines = await _ask("scheduler", engine.engine_core.call_utility_all_async("telltale_status"))
    _require_same("scheduler", engines, plan.digest)
    before = await _ask("worker", engine.collective_rpc("telltale_status"))
    _require_same("worker", before, plan.digest)
    prompt, chat = _prompt(engine), Origin(Format.CHAT)
    chat.note(prompt, PromptMap((Run(Role.USER, len(prompt)),), stream_from=len(prompt)))
    origin = enter_origin(chat)
    try:
        record = await _request(engine, prompt)
    finally:
        leave_origin(origin)
    after = await engine.collective_rpc("telltale_status")
    fired = {str(tap): _count(after, str(tap)) - _count(before, str(tap)) for tap in plan.bank.taps}
    silent = [tap for tap, count in fired.items() if count <= 0]
    if silent:
        raise ProofError(f"the taps {', '.join(silent)} did not run although a request went through their layers.")
    described = record.describe()
    skipped: Mapping[str, int] = described["detectors"][0]["skipped"] if described["detectors"] else {}
    total = record.scored + sum(skipped.values())
    unexpected = set(skipped) - {"sink", "final"}
    if total != record.num_positions or unexpected:
        raise ProofError(
            f"of {record.num_positions} positions {record.scored} were scored and {dict(skipped)} skipped: tokens pass "
            "unseen."
        )
    return Proof(plan.digest, len(engines), len(after), fired, record.scored, skipped, described)


async def _ask(kind: str, question: Awaitable[Sequence[Mapping[str, Any]]]) -> Sequence[Mapping[str, Any]]:
    try:
        return await question
    except Exception as error:  # vLLM passes on the other process's failure as a bare Exception
        raise ProofError(
            f"a {kind} does not answer as a monitored one ({error}). The plug-in is not in place in its process: vLLM "
            "logs why, above, and goes on without it."
        ) from error


def _prompt(engine: Any) -> list[int]:
    size = int(engine.model_config.get_vocab_size())
    longest = max(1, min(_PROMPT_TOKENS, int(engine.model_config.max_model_len) - _NEW_TOKENS - 1))
    return [(7 + 31 * number) % size for number in range(longest)]


async def _request(engine: Any, tokens: Sequence[int]) -> Record:
    params = SamplingParams(
        max_tokens=_NEW_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    found: Record | None = None
    prompt = tokens_input(prompt_token_ids=list(tokens))
    async for output in engine.generate(prompt, params, f"telltale-proof-{uuid.uuid4().hex}"):
        for completion in output.outputs:
            found = record_of(completion) or found
    if found is None:
        raise ProofError("a request went through the engine without a report from its scheduler.")
    return found


def _require_same(kind: str, statuses: Sequence[Mapping[str, Any]], digest: str) -> None:
    if not statuses:
        raise ProofError(f"no {kind} answered. Look at the log above for the process that failed.")
    for number, status in enumerate(statuses):
        if not status:
            raise ProofError(
                f"{kind} {number} runs without the telltale plug-in. Check VLLM_PLUGINS in its environment."
            )
        if status["version"] != serving.__version__ or status["digest"] != digest:
            raise ProofError(
                f"{kind} {number} runs version {status['version']} with the plan {status['digest'][:12]}..., "
                f"this process {serving.__version__} with {digest[:12]}...: the policy file or an artifact changed "
                "during the start. "
                "Start again."
            )


def _count(statuses: Sequence[Mapping[str, Any]], tap: str) -> int:
    return sum(int(status["taps"].get(tap, 0)) for status in statuses)
