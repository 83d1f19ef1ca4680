"""The proof that an engine is monitored: every process runs the same plan and bank, and nothing passes unseen.

A request through it is scored whole, and canaries come back with the scores that the cards state.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

import serving
from monitor.segments import PromptMap, Run
from monitor.types import Role
from probes.bank import Bank
from probes.card import Format
from probes.errors import TelltaleError
from serving.engine.canary import Canaries
from serving.engine.frontend import Frontend, record_of
from serving.engine.records import Record
from serving.origin import Origin, enter_origin, leave_origin

_PROMPT_TOKENS = 8
_NEW_TOKENS = 3
_ANSWER_SECONDS = 60.0


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
        canaries: detectors whose scores were compared with their cards.
        without_canary: the others; of them only coverage is proved.
        canary_seconds: that the canaries took.
    """

    digest: str
    engines: int
    workers: int
    taps: Mapping[str, int]
    scored: int
    skipped: Mapping[str, int]
    described: Mapping[str, Any]
    canaries: Sequence[str]
    without_canary: Sequence[str]
    canary_seconds: float

    def summary(self) -> dict[str, Any]:
        """In few words, for the log."""
        return {
            "digest": self.digest[:12],
            "engines": self.engines,
            "workers": self.workers,
            "taps": dict(self.taps),
            "canaries": list(self.canaries),
            "without_canary": list(self.without_canary),
            "canary_seconds": round(self.canary_seconds, 3),
        }


async def prove(engine: Any, frontend: Frontend, canaries: Canaries) -> Proof:
    """Ask every process what it runs, send one request through, check that all of it was scored; then the canaries.

    Args:
        engine: vLLM's ``AsyncLLM``.
        frontend: of this process.
        canaries: of its engines.
    Raises:
        ProofError: says which part does not answer, differs or does not see.
    """
    plan = frontend.deployment.plan
    ask_all = engine.engine_core.call_utility_all_async
    engines = await _ask("scheduler", ask_all("telltale_control", "handshake", {}))
    _require_same("scheduler", engines, plan.digest)
    before = await _ask_workers(engine)
    _require_same("worker", before, plan.digest)
    require_resident(plan.bank, [status["resident"] for status in before])
    prompt, chat = _prompt(engine), Origin(Format.CHAT)
    chat.note(prompt, PromptMap((Run(Role.USER, len(prompt)),), stream_from=len(prompt)))
    origin = enter_origin(chat)
    try:
        record = await _request(engine, prompt)
    finally:
        leave_origin(origin)
    after = await _ask_workers(engine)
    fired = {str(tap): _count(after, str(tap)) - _count(before, str(tap)) for tap in plan.bank.taps}
    silent = [tap for tap, count in fired.items() if count <= 0]
    if silent:
        raise ProofError(f"the taps {', '.join(silent)} did not run although a request went through their layers.")
    described = record.describe()
    # From the account itself: clients are not told of detectors that are read for conversations only.
    skipped = record.account()
    total = record.scored + sum(skipped.values())
    unexpected = set(skipped) - {"sink", "final"}
    if total != record.num_positions or unexpected:
        raise ProofError(
            f"of {record.num_positions} positions {record.scored} were scored and {dict(skipped)} skipped: tokens pass "
            "unseen."
        )
    failure = await canaries.round()
    if failure is not None:
        raise ProofError(
            f"{failure.detail}. The engine does not read what the card says it must: the weights, the card or vLLM's "
            "numerics differ from those that it was written with. If the detector is sound, write its canary anew: "
            "telltale canary ARTIFACT --model MODEL."
        )
    known = {expected.detector for prompt in canaries.prompts for expected in prompt.expected}
    return Proof(
        digest=plan.digest,
        engines=len(engines),
        workers=len(after),
        taps=fired,
        scored=record.scored,
        skipped=skipped,
        described=described,
        canaries=sorted(known),
        without_canary=sorted(set(plan.cards) - known),
        canary_seconds=canaries.seconds,
    )


def require_resident(bank: Bank, resident: Sequence[Mapping[str, str]]) -> None:
    """Refuse workers that multiply with something else than the bank.

    Args:
        bank: of this process.
        resident: of each worker, the digest of what lies on its device, by tap.
    Raises:
        ProofError: names the worker and the tap.
    """
    for matrix in bank.matrices:
        tap, digest = str(matrix.tap), matrix.digest()
        for number, found in enumerate(resident):
            if found.get(tap, digest) != digest:
                raise ProofError(
                    f"worker {number} multiplies at {tap} with {found[tap][:12]}..., the bank holds {digest[:12]}...: "
                    "the weights were damaged on their way to the device. Start again; if it stays, test the memory."
                )
        if not any(tap in found for found in resident):
            raise ProofError(f"no worker has the tap {tap}. Look at the log above for the worker that should.")


async def _ask_workers(engine: Any) -> list[Mapping[str, Any]]:
    question = engine.engine_core.call_utility_all_async("collective_rpc", "telltale_status", None, (), {})
    by_engine: Sequence[Any] = await _ask("worker", question)
    return [status for workers in by_engine for status in workers]


async def _ask(kind: str, question: Awaitable[Sequence[Any]]) -> Sequence[Any]:
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
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
