"""The words of docs/coverage.md: modes, invariants and faults. A marker that uses another word is an error.

Only the standard library: the table is written without importing vLLM or torch.
"""

from __future__ import annotations

from dataclasses import dataclass

MODES: dict[str, str] = {
    "whole prompts": "each prompt in one step, no prefix cache",
    "chunked prefill": "a prompt in several steps",
    "cold prefix cache": "prefix caching on, first time",
    "warm prefix cache": "blocks that are not computed again",
    "burst with one prefix": "requests at once that share blocks still being computed",
    "preemption": "too few KV blocks: computed again from the start",
    "ngram drafts": "speculative decoding; some drafts are rejected",
    "several requests at once": "one batch, other owners",
    "synchronous scheduler": "one step at a time",
    "asynchronous scheduler": "the next step is scheduled before the last one's result is there",
    "padded rows": "rows of a step that belong to nobody, as CUDA graphs leave them",
    "compiled": "`enforce_eager` off, on a CPU",
    "tensor parallel": "two workers, eager, on a CPU",
    "pipeline parallel": "two stages, eager, on a CPU",
    "pipeline parallel, compiled": "two stages, `enforce_eager` off, on a CPU",
    "data parallel": "several engines behind one API",
    "V2 runner": "vLLM's newer model runner, its Triton kernels in Triton's interpreter; skipped without Triton",
    "CUDA": "either runner on a GPU, with and without CUDA graphs",
    "each architecture": "every entry of the layer registry",
    "chat": "`/v1/chat/completions`",
    "raw prompts": "`/v1/completions`, or tokens",
    "responses and messages": "`/v1/responses`, `/v1/messages`",
    "streaming": "tokens are sent as they come",
    "n > 1": "several choices of one prompt",
    "logprobs": "of the reply's tokens",
    "prompt logprobs": "of the prompt's tokens",
    "tool calls": "a reply that a tool parser reads",
    "one-token requests": "`max_tokens: 1`",
    "prefilled assistant text": "a prompt that ends within a reply",
    "stop strings": "found outside the engine, which is told late",
    "client disconnect": "the connection is closed in the middle",
    "timeout": "the client waits no longer",
    "abort": "cut off inside the engine",
    "slow reader": "a client that reads slowly",
    "canary requests": "our own, among those of users",
    "steered requests": "rows that a steer writes to, and those of their batch mates",
}
"""Ways in which people run the engine or ask it, and what is meant."""

NOT_COVERED: dict[str, str] = {
    "CUDA": "nothing has run on a GPU: see [cuda.md](cuda.md) for what was run without one",
}
"""Modes for which there is no test, and why. A mode is here or has a test, never both."""

ACCOUNTED = "every position accounted for"
GAP_FOLLOWED = "gap counted, on_gap followed"

INVARIANTS: dict[str, str] = {
    ACCOUNTED: "`scored + skipped == positions`, each position once; skipped are only sinks and the final token",
    "readouts equal transformers": "what the taps read is the residual stream that transformers computes",
    "statistics equal batch": "an aggregate is the one of all scores of the request at once",
    "verdict the same": "the rule that decides, and its score, do not depend on the mode",
    "tokens unchanged": "the reply's tokens are those without the mode, or without the monitor",
    "roles kept": "who wrote which token of the prompt, and so which rule reads it",
    "account arrives": "counts and the verdict on the reply come although nobody waits for them",
    "no token leaks": "`hold_back` of a rule's window: none of it has been sent when it blocks",
    "isolation": "rows, verdicts, counts and errors of one request do not touch another",
    "it really happens": "the test's engine was in this mode: chunks, hits, preemptions were counted",
    "noticed": "the fault is recognised where it happens",
    GAP_FOLLOWED: "positions are counted under the reason, and the policy's `on_gap` decides",
    "not ready meanwhile": "`/ready` is 503 and the metrics say so, until a canary passes",
    "refused at the start": "the server ends before it serves, with a message that says what to do",
    "clean error and exit": "clients are told, nobody waits for ever, and the exit code is not 0",
    "kept out": "what would weaken the monitor is refused, or has no effect",
}
"""What is proved, and what is meant."""


@dataclass(frozen=True)
class Fault:
    """A fault that tests inject.

    Attributes:
        counted: the reason of the gap, or the metric; empty where nothing of the kind exists.
        follows: what happens, where it does not depend on ``on_gap``.
        on_gap: what the client gets under ``on_gap`` block, flag and allow.
    """

    counted: str = ""
    follows: str = ""
    on_gap: tuple[str, str, str] = (
        "refusal instead of the reply",
        "whole reply, flagged by `on_gap`",
        "whole reply, only counted",
    )

    @property
    def is_gap(self) -> bool:
        """Whether ``on_gap`` decides."""
        return not self.follows


AT_START = "no server: exit code 2 and a message"
FAULTS: dict[str, Fault] = {
    "NaN in a readout": Fault("not_finite"),
    "infinite readout": Fault("not_finite"),
    "tap that stops firing": Fault("not_finite"),
    "step without readouts": Fault("no_readouts"),
    "readouts with rows missing": Fault("no_readouts"),
    "readouts of another width": Fault("monitor_error"),
    "exception in the monitor": Fault("monitor_error"),
    "position that never came": Fault("unseen", on_gap=("blocked (Monitor alone)", "flagged (Monitor alone)", "-")),
    "steer that does not write": Fault("not_steered"),
    "canary: corrupted weights": Fault("canary"),
    "canary: corrupted bias": Fault("canary"),
    "canary: tap that stops firing": Fault("canary"),
    "canary: late": Fault("canary"),
    "canary: NaN": Fault("canary"),
    "canary: without readouts": Fault("canary"),
    "cached block without readouts": Fault(follows="the block does not count as cached: it is computed again"),
    "engine that hangs": Fault("telltale_canary_failures_total, no_answer", "`/ready` is 503 until it answers again"),
    "killed engine": Fault(
        follows="requests under way get an error, `/ready` is no longer 200, the server ends with an error"
    ),
    "killed worker": Fault(follows="requests under way get an error, the server ends with an error"),
    "worker without plug-in": Fault(follows=AT_START),
    "card whose canary another model gives": Fault(follows=AT_START),
    "weights on the device that are not the bank's": Fault(follows="refused at the handshake"),
    "setting under which tokens pass unseen": Fault(follows=AT_START),
    "architecture that was not read": Fault(follows=AT_START),
    "layer convention that is wrong": Fault(follows="the numeric check at the start names the layer"),
    "function of vLLM that changed": Fault(follows="the check that every start runs fails and names it"),
    "vLLM outside the range": Fault(follows=AT_START),
    "artifact of another model, or damaged": Fault(follows=AT_START),
    "graph compiled without taps": Fault(follows="the compile cache does not find it: taps are part of its key"),
    "reserved key in a request": Fault(follows="status 400 before anything runs"),
    "beam search": Fault(follows="status 400 before anything runs"),
    "trusted data forged or changed": Fault(
        "telltale_unsigned_requests_total", "not trusted: every rule reads everything"
    ),
    "forged turn in a message": Fault(
        "telltale_prompt_events_total, special_token_in_content", "the text stays its writer's; the client is told"
    ),
}
"""Faults, and what follows."""
