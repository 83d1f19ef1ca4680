"""Sends dead letters again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from monitor.sinks.dead_letters import DeadLetter, DeadLetters
from monitor.sinks.delivery import Delivery, Outcome
from monitor.sinks.message import Message


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of the dead letters of one sink.

    Attributes:
        delivered: how many were, and are gone from the file.
        left: how many stay there.
        failure: why the last one failed; None: none did.
    """

    delivered: int
    left: int
    failure: Outcome | None


def replay(letters: Sequence[DeadLetter], delivery: Delivery, box: DeadLetters) -> Replayed:
    """Send letters of one sink once each, in their order, under their first ids.

    One that the receiver refuses is passed over; if the receiver cannot be reached, the rest stays for later. A letter
    is taken out when it has arrived: whoever is cut off in between sends it twice, and the receiver knows it by its id.

    Args:
        letters: of the sink.
        delivery: to its receiver.
        box: where the letters are.
    Raises:
        SinkError: the file of dead letters is damaged.
        OSError: it cannot be written.
    """
    delivered, failure = 0, None
    for letter in letters:
        outcome = delivery.attempt(Message(letter.id, letter.body.encode()))
        if outcome.failure is None:
            box.remove({letter.key})
            delivered += 1
            continue
        failure = outcome
        if outcome.retry:
            break
    return Replayed(delivered, len(letters) - delivered, failure)
