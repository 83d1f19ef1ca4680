"""Hold-back: outputs wait in the scheduler until their tokens have been scored themselves.

The outputs are vLLM's own objects, let out late and unchanged: logprobs, stop strings and n > 1 stay exact.
"""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutput

BLOCKED = "telltale:blocked"
"""``stop_reason`` of a request that the monitor stopped; it never reaches a client."""


class HoldBack:
    """One output of each request may wait; the next step, which scores its token, lets it out or drops it."""

    def __init__(self) -> None:
        self._held: dict[str, EngineCoreOutput] = {}

    def pass_through(self, output: EngineCoreOutput, *, hold: bool) -> list[EngineCoreOutput]:
        """What may leave now that this output has come.

        Args:
            output: of this step.
            hold: whether the request's policy holds tokens back.
        """
        held = self._held.pop(output.request_id, None)
        if output.finish_reason is None and hold:
            self._held[output.request_id] = output
            return [held] if held is not None else []
        if held is None:
            return [output]
        if output.stop_reason == BLOCKED:
            # The flagged token goes; what else rode on its output does not.
            output.prefill_stats = output.prefill_stats or held.prefill_stats
            output.events = [*(held.events or ()), *(output.events or ())] or None
            output.new_prompt_logprobs_tensors = output.new_prompt_logprobs_tensors or held.new_prompt_logprobs_tensors
            return [output]
        return [held, output]

    def drop(self, request_id: str) -> None:
        """The request was aborted: nobody waits for its output."""
        self._held.pop(request_id, None)
