"""Hold-back: outputs wait in the scheduler until what follows their tokens has been scored.

The outputs are vLLM's own objects, let out late and unchanged: logprobs, stop strings and n > 1 stay exact.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreOutput

BLOCKED = "telltale:blocked"
"""``stop_reason`` of a request that the monitor stopped; it never reaches a client."""


@dataclass(slots=True)
class _Queue:
    """What waits of one request.

    Attributes:
        depth: ``hold_back`` of its policy.
        next_position: position of the token that will come next.
        waiting: outputs, and the position of the last token of each.
    """

    depth: int
    next_position: int
    waiting: deque[tuple[int, EngineCoreOutput]] = field(default_factory=deque)


class HoldBack:
    """A queue for each request whose policy holds back.

    With ``hold_back: k`` the token at position p leaves once all positions up to p + k - 1 have been scored without a
    block. A natural finish lets out what is left; a block drops it.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}

    def begin(self, request_id: str, *, depth: int, num_prompt: int) -> None:
        """A request has been admitted.

        Args:
            request_id: the engine's own id.
            depth: ``hold_back`` of its policy; 0 lets everything through.
            num_prompt: prompt tokens, which is the position of the first generated one.
        """
        if depth > 0:
            self._queues[request_id] = _Queue(depth, num_prompt)

    def pass_through(self, output: EngineCoreOutput, *, scored: int) -> list[EngineCoreOutput]:
        """What may leave now that this output has come.

        Args:
            output: of this step.
            scored: positions of the request that are accounted for, the tokens of this step not among them.
        """
        queue = self._queues.get(output.request_id)
        if queue is None:
            return [output]
        if output.finish_reason is not None:
            del self._queues[output.request_id]
            held = [item for _, item in queue.waiting]
            return [_inherit(output, held)] if output.stop_reason == BLOCKED else [*held, output]
        queue.next_position += len(output.new_token_ids)
        queue.waiting.append((queue.next_position - 1, output))
        released = []
        while queue.waiting and queue.waiting[0][0] + queue.depth <= scored:
            released.append(queue.waiting.popleft()[1])
        return released

    def count(self) -> int:
        """Outputs that wait, of all requests."""
        return sum(len(queue.waiting) for queue in self._queues.values())

    def drop(self, request_id: str) -> None:
        """The request was aborted: nobody waits for its outputs."""
        self._queues.pop(request_id, None)


def _inherit(output: EngineCoreOutput, held: list[EngineCoreOutput]) -> EngineCoreOutput:
    """The tokens of held outputs go; what else rode on them does not."""
    for item in held:
        output.prefill_stats = output.prefill_stats or item.prefill_stats
        output.new_prompt_logprobs_tensors = output.new_prompt_logprobs_tensors or item.new_prompt_logprobs_tensors
    events = [event for item in (*held, output) for event in item.events or ()]
    output.events = events or None
    return output
